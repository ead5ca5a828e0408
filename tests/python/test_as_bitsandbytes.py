"""qlora_native in bitsandbytes' place, in processes of their own: one unmodified program run with
either package, the names that are found, and the imports that are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_native.as_bitsandbytes import main
from tiny_llama import make_model

theirs = pytest.importorskip("bitsandbytes")
for _package in ("accelerate", "peft", "transformers"):
    pytest.importorskip(_package)

HERE = Path(__file__).parent
PROGRAM = HERE / "bnb_program.py"
RUNNER = ("-m", "qlora_native.as_bitsandbytes")


def python(*arguments: object, cwd: Path | None = None) -> str:
    """What a Python process prints, on one thread and without a network."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """The folders that the program wrote with bitsandbytes itself and with ours in its place."""
    folder = tmp_path_factory.mktemp("bnb")
    make_model().save_pretrained(folder / "model")
    printed = {
        "theirs": python(PROGRAM, folder / "model", folder / "theirs"),
        "ours": python(*RUNNER, PROGRAM, folder / "model", folder / "ours"),
    }
    assert printed["theirs"].split()[-2:] == ["bitsandbytes", theirs.__version__]
    assert printed["ours"].split()[-2:] == ["qlora_native.bitsandbytes", "0.50.2+qlora.native"]
    return {name: folder / name for name in printed}


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_transformers_peft_and_trainer_give_the_packages_numbers(runs):
    want, got = results(runs["theirs"]), results(runs["ours"])
    assert want.keys() == got.keys()
    for key in ("linears", "footprint", "parameters", "available", "trainable"):
        assert got[key] == want[key], key
    for key in (key for key in want if key.startswith("logits")):
        torch.testing.assert_close(
            torch.tensor(got[key]), torch.tensor(want[key]), atol=2e-4, rtol=1e-4, msg=key
        )
    for key in (key for key in want if key.startswith("losses")):
        assert got[key] == pytest.approx(want[key], rel=1e-3), key  # of issue 7
        assert len(got[key]) >= 10


def test_a_resumed_run_goes_on_to_the_bit(runs):
    got = results(runs["ours"])
    resumed = got["losses, resumed"]
    assert resumed == got["losses, 8-bit"][-len(resumed) :]


def test_the_quantized_folder_is_the_packages_byte_for_byte(runs):
    for name in ("model.safetensors", "config.json"):
        files = [(folder / "quantized" / name).read_bytes() for folder in runs.values()]
        assert files[0] == files[1], name


def test_adapters_have_the_same_names_and_values(runs):
    a, b = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in runs.values())
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, atol=1e-3, rtol=1e-3)


def test_checkpoints_of_either_trainer_hold_the_same_state(runs):
    a, b = (
        torch.load(folder / "8bit" / "checkpoint-10" / "optimizer.pt", weights_only=True)
        for folder in runs.values()
    )
    assert a["state"].keys() == b["state"].keys()
    for want, got in zip(a["param_groups"], b["param_groups"], strict=True):
        assert want.keys() <= got.keys() and want["params"] == got["params"]
    for key, state in a["state"].items():
        assert state.keys() == b["state"][key].keys() and state["step"] == b["state"][key]["step"]


def test_what_the_packages_and_its_users_suites_check(tmp_path):
    printed = python(*RUNNER, HERE / "bnb_behaviours.py", tmp_path)
    assert printed.splitlines()[-1] == "12 behaviours of qlora_native.bitsandbytes"


# ---- names and imports ---------------------------------------------------------------------------

NAMES = """
import importlib, importlib.metadata, importlib.util, pickle, sys
import qlora_native
ours = qlora_native.install_as_bitsandbytes()
assert qlora_native.install_as_bitsandbytes() is ours
import bitsandbytes, bitsandbytes as bnb
import bitsandbytes.functional as F
from bitsandbytes.nn.modules import Linear4bit
from bitsandbytes.optim.adamw import AdamW8bit
assert bitsandbytes is ours and F is ours.functional
assert Linear4bit is ours.nn.Linear4bit and AdamW8bit is ours.optim.AdamW8bit
assert "bitsandbytes" in str(AdamW8bit)                      # what transformers' Trainer looks for
assert importlib.util.find_spec("bitsandbytes") is not None
assert importlib.metadata.version("bitsandbytes") == bnb.__version__
assert importlib.metadata.metadata("bitsandbytes")["Name"] == "bitsandbytes"
assert importlib.metadata.version("torch")
assert "bitsandbytes" in importlib.metadata.packages_distributions()
for name in ("bitsandbytes.research", "bitsandbytes.cextension"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        assert name in str(error)
    else:
        raise SystemExit(f"{name} was found")
"""

REFUSED = """
import bitsandbytes, qlora_native
try:
    qlora_native.install_as_bitsandbytes()
except ImportError as error:
    assert "imported already" in str(error) and bitsandbytes.__file__ in str(error), error
else:
    raise SystemExit("not refused")
assert not hasattr(bitsandbytes.nn.Linear4bit, "_restored_state")
"""

# As on a machine without the package, and with the libraries imported before the call.
ABSENT = """
import importlib.metadata, importlib.machinery, sys
find = importlib.machinery.PathFinder.find_spec
find_metadata = importlib.metadata.MetadataPathFinder
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, *rest: None if name == "bitsandbytes" else find(name, *rest)
)
search = find_metadata._search_paths
find_metadata._search_paths = classmethod(
    lambda cls, name, paths: [] if name == "bitsandbytes" else search(name, paths)
)
import accelerate, peft, transformers
import transformers.integrations.bitsandbytes as integration
from peft.import_utils import is_bnb_available
from transformers.utils import is_bitsandbytes_available
assert not is_bitsandbytes_available() and not is_bnb_available()
import qlora_native
qlora_native.install_as_bitsandbytes()
assert is_bitsandbytes_available() and is_bnb_available()
assert accelerate.utils.is_4bit_bnb_available()
config = transformers.BitsAndBytesConfig(load_in_4bit=True)
assert integration.bnb.nn.Linear4bit and peft.helpers.bnb.nn.Params4bit
from peft.tuners.lora.bnb import dispatch_bnb_4bit
"""

# One plain adapter is one op; peft's own forward serves the rest, to the same numbers.
ONE_OP = """
import qlora_native
qlora_native.install_as_bitsandbytes()
import bitsandbytes, peft, torch
from torch.utils._python_dispatch import TorchDispatchMode


class Ops(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        names.append(str(op))
        return op(*args, **(kwargs or {}))


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = bitsandbytes.nn.Linear4bit(96, 64, compute_dtype=torch.float32)
        self.is_loaded_in_4bit = True

    def forward(self, x):
        return self.layer(x)


model = Model().to("cpu")
model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["layer"]))
layer = model.base_model.model.layer
assert isinstance(layer, peft.tuners.lora.Linear4bit), type(layer)
torch.nn.init.normal_(layer.lora_B["default"].weight)
x = torch.randn(5, 96, requires_grad=True)


def forward():
    global names
    names = []
    with Ops():
        return model(x)


def run():
    y = forward()
    gradients = torch.autograd.grad(y.square().sum(), [x, *layer.lora_A.parameters()])
    return y, *gradients


ours = run()
assert [n for n in names if "qlora_native" in n] == ["qlora_native.qlora_linear.default"], names
layer.lora_A["default"].register_forward_hook(lambda *_: None)
theirs = run()
assert "qlora_native.linear_4bit.default" in names, names
for a, b in zip(ours, theirs):  # sums of some 100 products in float32, in another order
    assert (a - b).norm() <= 100 * 2**-24 * b.norm()
with model.disable_adapter():
    forward()
assert "qlora_native.linear_4bit.default" in names, names
"""


@pytest.mark.parametrize(
    "code", [NAMES, REFUSED, ABSENT, ONE_OP], ids=["names", "refused", "absent", "one_op"]
)
def test_imports(code):
    python("-c", code)


def test_the_runner_runs_modules_as_python_does(tmp_path):
    (tmp_path / "helper.py").write_text("import bitsandbytes\nname = bitsandbytes.__name__\n")
    script = "import sys, helper\nprint(__name__, helper.name, sys.argv[1:])\n"
    (tmp_path / "script.py").write_text(script)
    printed = python(*RUNNER, "-m", "script", "--a", "b", cwd=tmp_path)
    assert printed == "__main__ qlora_native.bitsandbytes ['--a', 'b']\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "usage"), (["-x"], "usage"), (["-m"], "usage"), (["nothing.py"], "no script at nothing")],
)
def test_the_runner_says_how_it_is_used(arguments, message):
    with pytest.raises(SystemExit, match=message):
        main(arguments)


# ---- torch.ops.bitsandbytes ----------------------------------------------------------------------

OPS = """
import sys, torch, qlora_native
from torch._subclasses import FakeTensorMode
qlora_native.install_as_bitsandbytes()
calls, results = torch.load(sys.argv[1], weights_only=False), {}
for name, args in calls.items():
    op = getattr(torch.ops.bitsandbytes, name)
    results[name] = got = op(*args)
    with FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(a) if torch.is_tensor(a) else a for a in args))
    for real, shape in zip(*((x,) if torch.is_tensor(x) else x for x in (got, fake))):
        assert (real.shape, real.dtype) == (shape.shape, shape.dtype), name
    if name.startswith(("deq", "gemv")):
        out = torch.empty_like(got)
        op.out(*args, out=out)
        assert torch.equal(out, got), name
torch.save(results, sys.argv[2])
"""


def test_the_ops_of_torch_that_have_the_packages_names(tmp_path):
    w, x = torch.randn(32, 128), torch.randn(3, 128)
    packed, absmax = torch.ops.bitsandbytes.quantize_4bit(w, 64, "nf4", torch.uint8)
    code8 = theirs.functional.create_dynamic_map()
    codes, scales = torch.ops.bitsandbytes.quantize_blockwise(w, code8, 256)
    code4 = theirs.functional.get_4bit_type("nf4", "cpu")
    state = theirs.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)[1]
    nested = (state.absmax, state.state2.code, state.offset)
    calls = {
        "quantize_4bit": (w, 64, "nf4", torch.bfloat16),
        "dequantize_4bit": (packed, absmax, 64, "nf4", [32, 128], torch.bfloat16),
        "gemm_4bit": (x, packed, [32, 128], state.state2.absmax, 64, "nf4", x[0, :32], *nested),
        "gemv_4bit": (x, packed, [32, 128], absmax, code4, 64),
        "quantize_blockwise": (w, code8, 256),
        "dequantize_blockwise": (codes, scales, code8, 256, torch.float32),
    }
    torch.save(calls, tmp_path / "calls")
    python("-c", OPS, tmp_path / "calls", tmp_path / "results")
    results = torch.load(tmp_path / "results", weights_only=True)
    for name, args in calls.items():
        # The package's own gemv_4bit computes in bfloat16 on some processors.
        same = "gemm_4bit" if name == "gemv_4bit" else name
        args = (*args[:4], 64, "nf4") if name == "gemv_4bit" else args
        want = getattr(torch.ops.bitsandbytes, same)(*args)
        if name == "quantize_4bit":
            assert torch.equal(results[name][0].view(torch.uint8), want[0].view(torch.uint8))
            want, results[name] = want[1], results[name][1]
        torch.testing.assert_close(results[name], want)

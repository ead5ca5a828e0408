"""report.json and report.md, from the state and from what each stage left."""

from __future__ import annotations

import datetime
import json
from typing import Any

import torch

from bench.gpu_acceptance import paging
from bench.gpu_acceptance.setting import Setting


def _device(setting: Setting) -> str:
    if setting.emulate:
        return "the emulator: nothing here says anything about a GPU's speed"
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"


def _cell(measured: dict[str, Any]) -> str:
    if "error" in measured:
        return f"failed: {measured['error']}".replace("|", "/").replace("\n", " ")
    return f"{measured['seconds'] * 1e6:.1f} µs, {measured['of_limit']:.0%}"


def _mark(row: dict[str, Any]) -> str:
    return f"**{', '.join(row['slower_than'])}**" if row["slower_than"] else ""


def _microbench(result: dict[str, Any]) -> list[str]:
    rates = result["limits"]
    names = list(dict.fromkeys(name for row in result["rows"] for name in row["measured"]))
    lines = [
        f"Measured here: {rates['bytes_per_second'] / 1e9:.0f} GB/s of a copy (both ways), "
        f"{rates['flops'] / 1e12:.1f} TFLOP/s of torch's bf16 product. A cell is the time of a "
        "call and the share of the nearer of the two limits.",
        "",
        f"Ours is slower than a peer in {sum(bool(row['slower_than']) for row in result['rows'])} "
        f"of {len(result['rows'])} rows; they are marked.",
        "",
        f"| work | limiter | {' | '.join(names)} | slower than |",
        f"|---|---|{'---:|' * len(names)}---|",
    ]
    for row in result["rows"]:
        cells = (_cell(row["measured"][n]) if n in row["measured"] else "–" for n in names)
        lines.append(f"| {row['name']} | {row['limiter']} | {' | '.join(cells)} | {_mark(row)} |")
    return lines


def _tune(result: dict[str, Any]) -> list[str]:
    lines = [
        f"{result['cases']} cases, in {result.get('table')}; the shipped table names another way "
        f"than the fastest in {len(result['disagree'])}.",
        "",
        "| direction | dtype | N × K | M up to | shipped | fastest | all, µs |",
        "|---|---|---|---:|---|---|---|",
    ]
    for case in result["disagree"]:
        times = ", ".join(f"{way} {s * 1e6:.1f}" for way, s in case["seconds"].items())
        lines.append(
            f"| {case['direction']} | {case['dtype']} | {case['n']} × {case['k']} | "
            f"{case['most_m']} | {case['shipped']} | {case['way']} | {times} |"
        )
    for case in result["no_way"]:
        lines += ["", f"no way serves {case}"]
    if result["not_reached"]:
        lines += ["", f"not reached in time: {result['not_reached']}"]
    return lines


def _sass(result: dict[str, Any]) -> list[str]:
    lines = [f"Not here: {one}." for one in result["not_here"]]
    if "report" in result:
        report = result["report"]
        lines.append(f"The compiler reported {report['kernels']} kernels in this build.")
        lines += ["", *(f"- FAULT: {fault}" for fault in report["faults"])]
    if "code" in result:
        faults = result["code"]["faults"]
        lines += [
            "",
            f"Machine code for {result['architecture']}, {len(faults)} faults.",
            "",
            *(f"- FAULT: {fault}" for fault in faults),
            "",
        ]
        lines += ["| kernel | instances | registers, most | made of |", "|---|---:|---:|---|"]
        lines += [
            f"| {row['kernel']} | {row['instances']} | {row['registers']} | "
            f"{', '.join(row['instructions'])} |"
            for row in result["code"]["kernels"]
        ]
    return lines


def _rate(bytes_per_second: float | None) -> str:
    return "–" if bytes_per_second is None else f"{bytes_per_second / 1e9:.1f} GB/s"


def _of_bar(value: float, bar: float, most: bool) -> str:
    reached = value <= bar if most else value >= bar
    return f"{value:.2f} ({'≤' if most else '≥'} {bar}: {'reached' if reached else 'missed'})"


def _paging(result: dict[str, Any]) -> list[str]:
    rate = result["link_bytes_per_second"]
    lines = [
        f"The link, by copies both ways at once: {_rate(rate)} each way. Steps of AdamW, 32-bit "
        "state: their time as a multiple of the plain one's, what moved a second, and the share of "
        "the time that the step waited for it.",
        "",
        "| state | pager | of the plain step | in | out | of the link | waited | same bits |",
        "|---|---|---|---|---|---|---:|---|",
    ]
    for where in ("resident", "on the host"):
        for pager in paging.PAGERS:
            row = result.get(where, {}).get(pager)
            if row is None or "lacks" in row:
                lines.append(f"| {where} | {pager} | {row and row['lacks']} | | | | | |")
                continue
            slower = min(row["in_per_second"], row["out_per_second"])
            of_plain, of_link = f"{row['of_plain']:.2f}", "–"
            if rate is not None and where == "resident":
                of_plain = _of_bar(row["of_plain"], paging.MOST_RESIDENT, most=True)
            elif rate is not None:
                of_link = _of_bar(slower / rate, paging.LEAST_OF_LINK, most=False)
            lines.append(
                f"| {where} | {pager} | {of_plain} | {_rate(row['in_per_second'])} | "
                f"{_rate(row['out_per_second'])} | {of_link} | {row['waited']:.0%} | "
                f"{'yes' if row['equal'] else 'NO'} |"
            )
    if "oversubscribed" in result:
        row = result["oversubscribed"]
        lines += [
            "",
            f"Oversubscribed: {row['bytes'] / 1e9:.1f} GB of managed memory where "
            f"{row['free'] / 1e9:.1f} GB are free: {_rate(row['in_per_second'])} in, "
            f"{_rate(row['out_per_second'])} out, contents {'right' if row['equal'] else 'WRONG'}.",
        ]
    return lines


def _as_json(result: dict[str, Any]) -> list[str]:
    return ["```json", json.dumps(result, indent=1), "```"]


_PARTS = {"sass": _sass, "microbench": _microbench, "tune": _tune, "paging": _paging}


def write(setting: Setting, state: dict[str, Any]) -> None:
    results = {
        name: json.loads(setting.result(name).read_text())
        for name in state
        if setting.result(name).exists()
    }
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    about = {"date": date, "device": _device(setting), "torch": torch.__version__}
    report = {**about, "stages": state, "results": results}
    (setting.folder / "report.json").write_text(json.dumps(report, indent=1))
    lines = [
        "# GPU acceptance", "",
        f"{about['device']}; torch {about['torch']}; {about['date']}", "",
        "| stage | outcome | seconds | what |", "|---|---|---:|---|",
        *(f"| {n} | {s['outcome']} | {s['seconds']} | {s['what']} |" for n, s in state.items()),
    ]  # fmt: skip
    for name, ended in state.items():
        lines += ["", f"## {name}", ""]
        if name in results:
            lines += _PARTS.get(name, _as_json)(results[name])
        if ended["log_tail"]:
            lines += ["", "```", ended["log_tail"], "```"]
    (setting.folder / "report.md").write_text("\n".join(lines) + "\n")

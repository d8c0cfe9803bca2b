"""Time and memory of a streamed conversion, compared with a plain copy.

    python examples/benchmarks/bench_streaming.py --gib 4 --shards 42
    python examples/benchmarks/bench_streaming.py --gib 2 --shards 20 --save
    python examples/benchmarks/bench_streaming.py --prefix "taskset -c 0"                     on one core
    python examples/benchmarks/bench_streaming.py --env "OPENSSL_ia32cap=~0x0:~0x20000000"    no SHA instructions

Two commands run on the same synthetic Llama checkpoint, in turn, `--rounds` times. Their medians are compared:

    convert   python -m surgery apply mqa BASE -o OUT --no-check --no-eval
    copy      cp -r BASE COPY && sync && sha256sum COPY/*

A conversion reads, rewrites, hashes and fsyncs every file, so a copy on the disk with its hashes is the least work
that is possible. The time of each command ends with a `sync`. Each begins after a `sync` and a rest: a virtual machine
returns freed memory to its host after some seconds, and writing into memory that was just freed is four times as fast
as writing into memory that the host must find first. Memory is ru_maxrss of the process. Timings from a busy machine
mean nothing: "others" is the CPU time that other processes took in the same time. `--save` writes the medians to
results/streaming.json, where they replace those of the same checkpoint under the same conditions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

from make_checkpoint import make_checkpoint
from results import FOLDER, write

SHARD = 1 << 30
REST = 10  # seconds
COPY_IN_PYTHON = """
import hashlib, os, pathlib, shutil, sys
base, copy = map(pathlib.Path, sys.argv[1:])
shutil.copytree(base, copy)
getattr(os, "sync", bool)()
for path in sorted(copy.iterdir()):
    with open(path, "rb") as file:
        print(hashlib.file_digest(file, "sha256").hexdigest(), path)
"""
# ru_maxrss of a new process begins with what its parent held, so this script imports nothing big.


def convert_command(base: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "surgery", "apply", "mqa", str(base), "-o", str(out), "--no-check", "--no-eval"]


def copy_command(base: Path, out: Path) -> list[str]:
    if all(map(shutil.which, ("sh", "cp", "sync", "sha256sum"))):
        return ["sh", "-c", 'cp -r "$0" "$1" && sync && sha256sum "$1"/*', str(base), str(out)]
    return [sys.executable, "-c", COPY_IN_PYTHON, str(base), str(out)]


def mergekit_command(mergekit: str, folder: Path, base: Path, out: Path) -> list[str]:
    """mergekit's passthrough of all layers: the same amount of reading and writing, nothing hashed."""
    layers = json.loads((base / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    source = {"model": str(base), "layer_range": [0, layers]}
    recipe = {"merge_method": "passthrough", "dtype": "bfloat16", "slices": [{"sources": [source]}]}
    (folder / "passthrough.yaml").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return [mergekit, str(folder / "passthrough.yaml"), str(out), "--no-copy-tokenizer", "--out-shard-size", "1B"]


def sync() -> None:
    if hasattr(os, "sync"):
        os.sync()


def measure(command: list[str], out: Path, env: dict[str, str]) -> dict:
    """Run a command: seconds until its data is on disk, CPU seconds, peak memory, CPU of others. Removes `out`."""
    sync()
    time.sleep(REST)
    env = os.environ | {"HF_HUB_OFFLINE": "1"} | env
    with tempfile.TemporaryFile() as log:
        busy, began = busy_seconds(), time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
        rss = cpu = None
        if hasattr(os, "wait4"):
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            rss = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            cpu = usage.ru_utime + usage.ru_stime
        process.wait()
        sync()
        seconds = time.perf_counter() - began
        others = None if busy is None or cpu is None else busy_seconds() - busy - cpu
        if process.returncode:
            log.seek(0)
            sys.exit(f"{shlex.join(command)}\nexit code {process.returncode}\n{log.read().decode(errors='replace')}")
    shutil.rmtree(out)
    return {"seconds": seconds, "cpu": cpu, "rss": rss, "others": others}


def median(runs: list[dict]) -> dict:
    """The median of each figure of several runs; None where the system does not report it."""
    return {key: None if runs[0][key] is None else statistics.median(run[key] for run in runs) for key in runs[0]}


def busy_seconds() -> float | None:
    """CPU seconds of all processes since the start of the machine; None where the system does not report them."""
    if not Path("/proc/stat").is_file():
        return None
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def disk_speed(folder: Path, size: int = 1 << 30) -> float:
    """Bytes per second when one file is written, fsync included."""
    noise, path = os.urandom(1 << 17), folder / "speed"
    sync()
    began = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for _ in range(size // len(noise)):
            file.write(noise)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return size / seconds


def machine() -> dict:
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    names = ("attention-surgery", "torch", "transformers", "safetensors")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in names},
    }


def bench(folder: Path, options: argparse.Namespace) -> dict:
    """All measurements, as plain data."""
    size, prefix, env = int(options.gib * 2**30), shlex.split(options.prefix), dict(options.env)
    base = make_checkpoint(folder / "base", size, shards=options.shards or -(-size // SHARD))
    tiny = make_checkpoint(folder / "tiny", 0, shards=1, hidden=64, heads=4, kv_heads=2, mlp=128, vocab=128)
    out, sides = folder / "out", {"convert": convert_command, "copy": copy_command}
    rounds = [
        {name: measure([*prefix, *command(base, out)], out, env) for name, command in sides.items()}
        for _ in range(options.rounds)
    ]
    medians = {name: median([each[name] for each in rounds]) for name in sides}
    tiny_runs = [measure([*prefix, *convert_command(tiny, out)], out, env) for _ in range(2)]
    result = {
        "bytes": sum(path.stat().st_size for path in base.iterdir()),
        "shards": len(list(base.glob("*.safetensors"))),
        "conditions": " ".join([options.prefix, *(f"{name}={value}" for name, value in env.items())]).strip(),
        "rounds": rounds,
        "medians": medians,
        "ratio": medians["convert"]["seconds"] / medians["copy"]["seconds"],
        "start": min(tiny_runs, key=lambda run: run["seconds"]),
        "disk": disk_speed(folder),
        "machine": machine(),
    }
    if options.mergekit:
        command = [*prefix, *mergekit_command(options.mergekit, folder, base, out)]
        result["mergekit"] = [measure(command, out, env) for _ in range(2)]
    return result


def mebibytes(size: float | None) -> str:
    return "?" if size is None else f"{size / 2**20:,.0f} MiB"


def show(result: dict) -> None:
    computer, versions = result["machine"], result["machine"]["versions"]
    print(f"{result['bytes'] / 2**30:.2f} GiB in {result['shards']} shards {result['conditions']}".rstrip())
    print(f"{computer['cpu']}, {computer['cores']} cores, {computer['system']}")
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    print(f"disk: {result['disk'] / 1e6:.0f} MB/s written, fsync included\n")
    print(f"{'':<28}{'seconds':>9}{'CPU':>8}{'peak RSS':>11}{'others':>8}")

    def row(label: str, run: dict) -> None:
        others, cpu = ("?" if run[key] is None else f"{run[key]:.2f}" for key in ("others", "cpu"))
        print(f"{label:<28}{run['seconds']:>9.2f}{cpu:>8}{mebibytes(run['rss']):>11}{others:>8}")

    for number, sides in enumerate(result["rounds"], 1):
        row(f"round {number}: convert", sides["convert"])
        row(f"round {number}: cp + sha256sum", sides["copy"])
    for number, run in enumerate(result.get("mergekit", []), 1):
        row(f"round {number}: mergekit", run)
    row("median: convert", result["medians"]["convert"])
    row("median: cp + sha256sum", result["medians"]["copy"])
    row("convert a tiny model", result["start"])
    print(f"\nratio of the medians: {result['ratio']:.2f}")


COLUMNS = [
    "checkpoint",
    {"name": "conditions", "align": "left"},
    {"name": "conversion", "format": "{:.1f} s"},
    {"name": "copy", "format": "{:.1f} s"},
    {"name": "ratio", "format": "{:.2f}"},
    {"name": "CPU", "format": "{:.1f} s"},
    {"name": "CPU of the copy", "format": "{:.1f} s"},
    {"name": "peak memory", "format": "{:,.0f} MiB"},
]


def save(result: dict, path: Path, command: str) -> None:
    """Put the medians into a results file (see results.py), whose other rows stay."""
    convert, copy = result["medians"]["convert"], result["medians"]["copy"]
    row = [
        f"{result['bytes'] / 2**30:.2f} GiB, {result['shards']} shards",
        f"`{result['conditions']}`" if result["conditions"] else "",
        round(convert["seconds"], 1),
        round(copy["seconds"], 1),
        round(result["ratio"], 2),
        convert["cpu"] and round(convert["cpu"], 1),
        copy["cpu"] and round(copy["cpu"], 1),
        convert["rss"] and round(convert["rss"] / 2**20),
    ]
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"command": [], "rows": []}
    commands = [*(old for old in known["command"] if old != command), command]
    machine = f"{result['machine']['cpu']}, {result['machine']['cores']} threads"
    write(path, commands, machine, COLUMNS, [*(old for old in known["rows"] if old[:2] != row[:2]), row])


def setting(text: str) -> tuple[str, str]:
    """NAME=VALUE as a pair."""
    name, separator, value = text.partition("=")
    if not (name and separator):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=4.0, help="size of the checkpoint")
    parser.add_argument("--shards", type=int, help="its files, at most; default one for each GiB")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side")
    parser.add_argument("--prefix", default="", help="a command that both sides are started with")
    parser.add_argument(
        "--env", type=setting, action="append", default=[], metavar="NAME=VALUE", help="for both sides"
    )
    parser.add_argument("--folder", type=Path, help="where to work; it decides which disk is measured")
    parser.add_argument("--mergekit", default=shutil.which("mergekit-yaml"), help="mergekit-yaml, for its passthrough")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--save", action="store_true", help="put the medians into results/streaming.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench-") as name:
        measured = bench(Path(name), options)
    if options.json:
        print(json.dumps(measured, indent=2))
    else:
        show(measured)
    if options.save:
        words = shlex.join(word for word in sys.argv[1:] if word != "--save")
        save(measured, FOLDER / "streaming.json", f"python examples/benchmarks/bench_streaming.py {words}".rstrip())


if __name__ == "__main__":
    main()

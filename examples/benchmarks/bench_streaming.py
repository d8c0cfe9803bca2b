"""How long a streamed conversion takes beside a plain copy, and how much memory.

    python examples/benchmarks/bench_streaming.py --gib 4

Two sides on the same synthetic Llama checkpoint, in turn, twice; the second round counts:

    convert   python -m surgery apply mqa BASE -o OUT --no-check --no-eval
    copy      cp -r BASE COPY && sha256sum COPY/*

A conversion reads, rewrites, hashes and fsyncs every file, so a copy followed by its hashes is the least that could
be asked for. `cp` leaves its data in the page cache; "to disk" adds the `sync` that ends this. Each side begins after
a `sync` and a rest: a virtual machine hands freed memory back to its host after some seconds, and writing into memory
that was freed just now is four times as fast as into memory that the host must find first. Memory is ru_maxrss of the
process. Timings taken on a busy machine mean nothing: "others" is the CPU time that everybody else took meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

from make_checkpoint import make_checkpoint

SHARD = 1 << 30
REST = 10  # seconds
COPY_IN_PYTHON = """
import hashlib, pathlib, shutil, sys
base, copy = map(pathlib.Path, sys.argv[1:])
shutil.copytree(base, copy)
for path in sorted(copy.iterdir()):
    with open(path, "rb") as file:
        print(hashlib.file_digest(file, "sha256").hexdigest(), path)
"""
# ru_maxrss of a new process begins with what its parent held, so this script imports nothing big.


def convert_command(base: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "surgery", "apply", "mqa", str(base), "-o", str(out), "--no-check", "--no-eval"]


def copy_command(base: Path, out: Path) -> list[str]:
    if all(map(shutil.which, ("sh", "cp", "sha256sum"))):
        return ["sh", "-c", 'cp -r "$0" "$1" && sha256sum "$1"/*', str(base), str(out)]
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


def measure(command: list[str], out: Path) -> dict:
    """Seconds, seconds until the data is on disk, CPU seconds and peak memory of a command; `out` is removed."""
    sync()
    time.sleep(REST)
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
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
        seconds = time.perf_counter() - began
        others = None if busy is None or cpu is None else busy_seconds() - busy - cpu
        sync()
        on_disk = time.perf_counter() - began
        if process.returncode:
            log.seek(0)
            sys.exit(f"{' '.join(command)}\nexit code {process.returncode}\n{log.read().decode(errors='replace')}")
    shutil.rmtree(out)
    return {"seconds": seconds, "to_disk": on_disk, "cpu": cpu, "rss": rss, "others": others}


def busy_seconds() -> float | None:
    """CPU seconds of all processes since the start of the machine, where the system tells."""
    if not Path("/proc/stat").is_file():
        return None
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def disk_speed(folder: Path, size: int = 1 << 30) -> float:
    """Bytes per second of writing one file, fsync included."""
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


def bench(folder: Path, gib: float, mergekit: str | None) -> dict:
    size = int(gib * 2**30)
    base = make_checkpoint(folder / "base", size, shards=-(-size // SHARD))
    tiny = make_checkpoint(folder / "tiny", 0, shards=1, hidden=64, heads=4, kv_heads=2, mlp=128, vocab=128)
    out, sides = folder / "out", {"convert": convert_command, "copy": copy_command}
    rounds = [{name: measure(command(base, out), out) for name, command in sides.items()} for _ in range(2)]
    start = min((measure(convert_command(tiny, out), out) for _ in range(2)), key=lambda run: run["seconds"])
    result = {
        "bytes": sum(path.stat().st_size for path in base.iterdir()),
        "rounds": rounds,
        "ratio": rounds[1]["convert"]["seconds"] / rounds[1]["copy"]["seconds"],
        "ratio_to_disk": rounds[1]["convert"]["to_disk"] / rounds[1]["copy"]["to_disk"],
        "start": start,
        "disk": disk_speed(folder),
        "machine": machine(),
    }
    if mergekit:
        command = mergekit_command(mergekit, folder, base, out)
        result["mergekit"] = [measure(command, out) for _ in range(2)]
    return result


def show(result: dict) -> None:
    computer, versions = result["machine"], result["machine"]["versions"]
    print(f"{result['bytes'] / 2**30:.2f} GiB, {computer['cpu']}, {computer['cores']} cores, {computer['system']}")
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    print(f"disk: {result['disk'] / 1e6:.0f} MB/s written, fsync included\n")
    print(f"{'':<28}{'seconds':>9}{'to disk':>9}{'CPU':>8}{'peak RSS':>11}{'others':>8}")

    def row(label: str, run: dict) -> None:
        rss = "?" if run["rss"] is None else f"{run['rss'] / 2**20:.0f} MiB"
        others, cpu = ("?" if run[key] is None else f"{run[key]:.2f}" for key in ("others", "cpu"))
        print(f"{label:<28}{run['seconds']:>9.2f}{run['to_disk']:>9.2f}{cpu:>8}{rss:>11}{others:>8}")

    for number, sides in enumerate(result["rounds"], 1):
        row(f"round {number}: convert", sides["convert"])
        row(f"round {number}: cp + sha256sum", sides["copy"])
    for number, run in enumerate(result.get("mergekit", []), 1):
        row(f"round {number}: mergekit", run)
    row("convert a tiny model", result["start"])
    second, start = result["rounds"][1], result["start"]["seconds"]
    alone = second["convert"]["seconds"] - start
    print(f"\nratio of the second rounds: {result['ratio']:.2f} (to disk: {result['ratio_to_disk']:.2f})")
    print(f"without start-up and imports ({start:.2f} s): {alone:.2f} s, {alone / second['copy']['seconds']:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=4.0, help="size of the checkpoint")
    parser.add_argument("--folder", type=Path, help="where to work; it decides which disk is measured")
    parser.add_argument("--mergekit", default=shutil.which("mergekit-yaml"), help="mergekit-yaml, for its passthrough")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench-") as name:
        measured = bench(Path(name), options.gib, options.mergekit)
    if options.json:
        print(json.dumps(measured, indent=2))
    else:
        show(measured)

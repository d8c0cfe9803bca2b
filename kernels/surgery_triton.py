"""Shared parts of the kernels: supported GPUs, checks of arguments, and one tile of the online softmax.

The module can be imported without triton (macOS, Windows, CPU-only installations). Then no kernel can be launched, and
the other functions work.
"""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from contextlib import nullcontext

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

# The interpreter runs kernels on CPU tensors, for tests. Triton reads the variable when a kernel is decorated.
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
LOG2E = math.log2(math.e)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

OLDEST = (3, 3)  # oldest version of triton; before it, the functions that are called here had other names
# Shared memory that one program may use, in KiB. The kernels were not compiled for targets that are not listed.
SHARED = {
    "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64,
    "interpreter": 227,
}  # fmt: skip
# Query rows and keys of a tile, warps, stages. They were chosen because every variant of the prefill kernels compiles
# without a spill (python -m surgery.kernels.compile) for sm_80, sm_90 and gfx942. They were not timed on any GPU. The
# other NVIDIA targets use the same lines; sm_120 spills up to 40 bytes with heads of 128. On NVIDIA, a float32 product
# is three products of tf32, for which heads of 256 need more registers than there are.
TILES = {
    ("cuda", "half", 64): (128, 64, 8, 3),
    ("cuda", "half", 128): (128, 32, 8, 3),
    ("cuda", "half", 256): (64, 32, 8, 2),
    ("cuda", "float32", 64): (32, 32, 4, 2),
    ("cuda", "float32", 128): (32, 32, 8, 2),
    ("hip", "half", 64): (64, 64, 4, 2),
    ("hip", "half", 128): (64, 64, 4, 2),
    ("hip", "half", 256): (64, 32, 4, 2),
    ("hip", "float32", 64): (64, 32, 4, 1),
    ("hip", "float32", 128): (32, 32, 4, 1),
    ("hip", "float32", 256): (16, 16, 4, 1),
}
LAUNCHES: Counter[str] = Counter()  # kernel -> how many times it was launched in this process
_warned: set[tuple] = set()
_broken: dict[tuple, str] = {}  # launch that failed -> reason


# Arguments that follow from lengths. Triton would compile anew for a 1 and for multiples of 16, while a model decodes.
VARYING = (
    "n", "first_slot", "length", "sinks", "window", "limit", "seen_slots", "piece", "pieces", "parts", "shift",
    "list_rows", "start", "columns", "l_b", "l_h", "m_b", "m_h", "m_n",
)  # fmt: skip


def jit(function):
    """`triton.jit`. Without triton, the unchanged function, which is never launched."""
    if triton is None:
        return function
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in names if name in VARYING])


def target(device) -> str | None:
    """The compilation target of a device: `sm_90`, `gfx942`, ..., `interpreter`; None if no kernel can run there."""
    device = torch.device(device)
    if triton is None:
        return None
    if device.type != "cuda":  # the device type of an AMD GPU is `cuda`, too
        return "interpreter" if INTERPRETED and device.type == "cpu" else None
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def tiles(head_dim: int, dtype: torch.dtype, name: str, table=TILES, interpreted=(32, 32, 1, 1)) -> tuple | None:
    """The line of a table of tiles for a target; None if no tile fits. `TILES` is the table of the prefill kernels."""
    if name == "interpreter":
        return interpreted
    kind = "hip" if name.startswith("gfx") else "cuda"
    return table.get((kind, "float32" if dtype == torch.float32 else "half", max(64, padded_size(head_dim))))


def unsupported(device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why no kernel supports such tensors, in words that fit after "the reference runs: "; None if one does.

    Args:
        head_dim: head size of queries and keys; it need not be a power of two.
    """
    device = torch.device(device)
    if triton is None:
        return "triton is not installed (extra: kernels)"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, OLDEST))}"
    name = target(device)
    if name is None:
        return "there is no GPU" if torch.device(device).type == "cpu" else f"{device} is no GPU of NVIDIA or AMD"
    if name not in SHARED:
        return f"no kernel was ever compiled for {name} (known: {', '.join(k for k in SHARED if k != 'interpreter')})"
    if dtype not in DTYPES:
        return f"{dtype} is not one of {', '.join(str(known) for known in DTYPES)}"
    if tiles(head_dim, dtype, name) is None:
        return f"no tile fits heads of size {head_dim} in {str(dtype).removeprefix('torch.')} on {name}"
    return None


def executor(device, dtype: torch.dtype | None = None, head_dim: int = 64) -> str:
    """What a kernel's call runs, in words: `Triton 3.3.0, compiled for sm_90`, or `PyTorch: ` and the reason.

    Args:
        dtype: by default float16 on a GPU and float32 elsewhere.
    """
    dtype = dtype or (torch.float16 if torch.device(device).type == "cuda" else torch.float32)
    reason = unsupported(device, dtype, head_dim)
    return f"Triton {triton.__version__}, compiled for {target(device)}" if reason is None else f"PyTorch: {reason}"


def said_once(kernel: str, reason: str | None, device) -> bool:
    """Whether the reference must run, that is, whether there is a `reason`. On a GPU, warn the first time."""
    if reason is not None and torch.device(device).type == "cuda" and (kernel, reason) not in _warned:
        _warned.add((kernel, reason))
        _warn(kernel, reason)
    return reason is not None


def _warn(kernel: str, reason: str) -> None:
    """Warn at the line that called the kernel's function, two calls further out."""
    warnings.warn(f"surgery.kernels.{kernel}: PyTorch runs in place of the kernel: {reason}", stacklevel=4)


def started(kernel: str, device, launch, kind: str = "") -> bool:
    """Launch a kernel. If that fails, return False: PyTorch must run, now and in later calls of this kind.

    The first failure of a kernel on a device gives a warning. A prompt must not fail because a compiler is missing or
    fails, or because a tile does not fit this GPU. A lack of GPU memory is raised. In the interpreter all errors are
    raised, so that tests see them.

    Args:
        kind: everything else that decides what is compiled (dtype, sizes). Another kind may still start.
    """
    place = kernel, str(device), kind
    if place in _broken:
        return False
    try:
        launch()
    except Exception as error:  # Triton, a C compiler or a driver can raise anything
        # Triton's driver has no class for a lack of memory: RuntimeError("Triton Error [CUDA]: out of memory")
        if INTERPRETED or isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            raise
        first = not any(other[:2] == place[:2] for other in _broken)
        _broken[place] = in_a_line(error)
        if first:  # other kinds of launch are likely to fail for the same reason
            _warn(kernel, _broken[place])
        return False
    LAUNCHES[kernel] += 1
    return True


def in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def failed(kernel: str = "") -> list[str]:
    """The launches that failed in this process, of one kernel or of all. PyTorch ran instead."""
    return [f"{' '.join(place)}: {why}" for place, why in sorted(_broken.items()) if kernel in ("", place[0])]


def check(kernel: str, query, key, value, pad=None):
    """Refuse invalid arguments of a kernel; tensors are [batch, heads, length, head_dim]. Returns contiguous `pad`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or a tensor requires a gradient.
    """
    if query.dim() != 4 or key.dim() != 4 or value.shape != key.shape:
        raise ValueError(f"{kernel}: query, key and value are [batch, heads, length, head_dim], key shaped as value")
    (batch, heads, _, size), (rows, kv_heads, _, key_size) = query.shape, key.shape
    if rows != batch or size != key_size or kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{kernel}: queries {list(query.shape)} do not fit keys {list(key.shape)}")
    if not query.dtype == key.dtype == value.dtype or not query.device == key.device == value.device:
        raise ValueError(f"{kernel}: query, key and value must have one dtype and one device")
    if torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value)):
        raise ValueError(f"{kernel} has no backward: call it under torch.no_grad(), or its reference to train")
    if pad is not None and (pad.shape != (batch,) or pad.is_floating_point() or pad.device != query.device):
        raise ValueError(f"{kernel}: pad is one whole number for each of the {batch} rows, on the device of the query")
    return None if pad is None else pad.contiguous()


def outputs(query, out=None, lse=None):
    """The tensors for output and log-sum-exp: those given, or new ones. The caller must write every element."""
    shape = query.shape
    out = torch.empty_like(query) if out is None else out
    lse = torch.empty(shape[:3], dtype=torch.float32, device=query.device) if lse is None else lse
    if out.shape != shape or out.dtype != query.dtype or lse.shape != shape[:3] or lse.dtype != torch.float32:
        raise ValueError("out is shaped as the query, of its dtype; lse is float32 [batch, heads, n]")
    return out, lse


def put(made, out, lse):
    """Compute a reference's result, and copy it into the tensors that were given, if any were."""
    return tuple(new if old is None else old.copy_(new) for new, old in zip(made(), (out, lse), strict=True))


def capped(scores, softcap: float | None):
    """Soft-capped scores of a reference; the scores are unchanged if there is no cap."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def masked_softmax(scores, seen):
    """A reference's weights and natural log-sum-exp over the last dimension; 0 and -inf if no key is seen."""
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    return (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp(), lse


def of_prefill(kernel, tile: tuple, types: dict, head_dim: int, dtype: torch.dtype, name: str, group: int) -> dict:
    """The `variants` of a prefill kernel without lists of blocks.

    Args:
        types: types of its arguments other than query, keys, values, output and log-sum-exp.
    """
    rows, keys, warps, stages = tile
    types = dict.fromkeys(("Q", "K", "V", "OUT"), dtype) | {"LSE": "*fp32"} | types
    fixed = {"GROUP": group, "D": head_dim, "BM": rows, "BN": keys, "BD": padded_size(head_dim), "UPCAST": False}
    fixed["PRECISION"] = precision(dtype, name)
    options = {"num_warps": warps, "num_stages": stages}
    plain, full = {"CAPPED": False, "PADDED": False, "PAD": None}, {"CAPPED": True, "PADDED": True}
    return {
        "plain": (kernel, types, fixed | plain, options),
        "pad, soft-cap": (kernel, types | {"PAD": "*i64"}, fixed | full, options),
    }


def factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """The arguments `factor` and `cap` of `tile_scores`, which works in base 2."""
    if softcap is None:
        return scale * LOG2E, 0.0
    return 2 * LOG2E * scale / softcap, softcap * LOG2E


def upcast(dtype: torch.dtype) -> bool:
    """Whether the interpreter must multiply in float32: its product of two bfloat16 tiles is wrong (triton 3.9.0)."""
    return INTERPRETED and dtype == torch.bfloat16


def precision(dtype: torch.dtype, name: str) -> str:
    """How `tl.dot` multiplies float32. On NVIDIA, full precision uses no tensor cores and spills; tf32x3 fits."""
    return "tf32x3" if dtype == torch.float32 and name.startswith("sm_") else "ieee"


def padded_size(head_dim: int) -> int:
    """The head size of a tile, padded to a power of two of at least 16, which `tl.dot` requires."""
    return max(16, 1 << (head_dim - 1).bit_length())


def on_device(tensor):
    """A context that launches on the tensor's GPU instead of the process's current GPU."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


@jit
def load_tile(at, inside, real, WHOLE: tl.constexpr, UPCAST: tl.constexpr):
    """Load a tile. It is 0 outside of `inside` and, if the head size is padded (not WHOLE), outside of `real`."""
    if WHOLE:
        tile = tl.load(at, mask=inside, other=0.0)
    else:
        tile = tl.load(at, mask=inside & real, other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@jit
def tile_scores(q, k, factor, cap, CAPPED: tl.constexpr, PRECISION: tl.constexpr):
    """Scores in base 2 of a tile of queries [rows, d] and keys [d, keys]; if CAPPED, cap * tanh(score / cap)."""
    scores = tl.dot(q, k, input_precision=PRECISION) * factor
    if CAPPED:
        scores = cap * (1.0 - 2.0 / (tl.exp2(scores) + 1.0))
    return scores


@jit
def softmax_step(scores, seen, v, top, total, acc, PRECISION: tl.constexpr):
    """Add one tile of scores [rows, keys] and values [keys, d] to the running softmax of the rows.

    `top` is the largest score so far, and `total` is the sum of 2^(score - top). A row that has seen no key keeps
    top = -inf. Subtracting -inf from itself would give NaN, so 0 is subtracted instead.
    """
    scores = tl.where(seen, scores, float("-inf"))
    new = tl.maximum(top, tl.max(scores, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(scores - safe[:, None])
    decay = tl.exp2(top - safe)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return new, total * decay + tl.sum(p, 1), acc


@jit
def add_tile(
    q, k_at, v_at, inside, real, seen, factor, cap, top, total, acc,
    WHOLE: tl.constexpr, UPCAST: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Read a tile of keys [d, keys] and values [keys, d], and add what the queries see of it to their softmax.

    `inside`: the keys that are there; `real`: the channels of a head; `seen`: broadcast to [rows, keys].
    """
    k = load_tile(k_at, inside[None, :], real[:, None], WHOLE, UPCAST)
    v = load_tile(v_at, inside[:, None], real[None, :], WHOLE, UPCAST)
    scores = tile_scores(q, k, factor, cap, CAPPED, PRECISION)
    return softmax_step(scores, seen, v, top, total, acc, PRECISION)


@jit
def store_rows(o_at, l_at, live, real, top, total, acc):
    """Write the output [rows, d] and the log-sum-exp [rows] of the rows that are there."""
    made, found = softmax_end(top, total, acc)
    tl.store(o_at, made.to(o_at.dtype.element_ty), mask=live[:, None] & real[None, :])
    tl.store(l_at, found, mask=live)


@jit
def softmax_end(top, total, acc):
    """Output [rows, d] and natural log-sum-exp [rows]; 0 and -inf in a row that has seen no key."""
    some = total > 0.0
    total = tl.where(some, total, 1.0)
    lse = tl.where(some, (top + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    return acc / total[:, None], lse

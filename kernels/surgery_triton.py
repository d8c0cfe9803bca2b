"""What the kernels share: which GPU runs them, what is refused, and one tile of the online softmax.

Works without triton (macOS, Windows, CPU-only installations): then nothing here runs but the questions.
"""

from __future__ import annotations

import math
import os
import warnings
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

OLDEST = (3, 3)  # of triton; before it, what is called here had other names
# Shared memory that one program may use, KiB. A target that is not listed was never compiled for here.
SHARED = {
    "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64,
    "interpreter": 227,
}  # fmt: skip
# Query rows and keys of a tile, warps, stages. Chosen by what compiles without a spill in every variant of the prefill
# kernels (python -m surgery.kernels.compile) for sm_80, sm_90 and gfx942; no GPU has timed them. The other NVIDIA
# targets share the lines, where sm_120 spills up to 40 bytes with heads of 128. On NVIDIA float32 is three products of
# tf32, for which heads of 256 need more registers than there are.
TILES = {
    ("cuda", "half", 64): (128, 64, 8, 3),
    ("cuda", "half", 128): (128, 64, 8, 2),
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
_warned: set[tuple] = set()
_broken: dict[tuple, str] = {}  # what could not be launched, and why


def jit(function):
    """`triton.jit`, or the function as it is where triton is not installed: nobody can launch it there."""
    return function if triton is None else triton.jit(function)


def target(device) -> str | None:
    """What compiles for a device: `sm_90`, `gfx942`, ..., `interpreter`; None where no kernel can run."""
    device = torch.device(device)
    if triton is None:
        return None
    if device.type != "cuda":  # an AMD GPU is `cuda` too
        return "interpreter" if INTERPRETED and device.type == "cpu" else None
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def tiles(head_dim: int, dtype: torch.dtype, name: str, table=TILES, interpreted=(32, 32, 1, 1)) -> tuple | None:
    """The line of a table of tiles for a target, for `TILES` that of a prefill kernel; None where no tile fits."""
    if name == "interpreter":
        return interpreted
    kind = "hip" if name.startswith("gfx") else "cuda"
    return table.get((kind, "float32" if dtype == torch.float32 else "half", max(64, padded_size(head_dim))))


def unsupported(device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why no kernel serves tensors of this kind, in words that fit after "the reference runs: "; None where one does.

    Args:
        head_dim: of queries and keys; sizes that are no power of two are served.
    """
    device = torch.device(device)
    if triton is None:
        return "triton is not installed (extra: kernels)"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, OLDEST))}"
    name = target(device)
    if name is None:
        return f"there is no GPU at {device}"
    if name not in SHARED:
        return f"no kernel was ever compiled for {name} (known: {', '.join(k for k in SHARED if k != 'interpreter')})"
    if dtype not in DTYPES:
        return f"{dtype} is not one of {', '.join(str(known) for known in DTYPES)}"
    if tiles(head_dim, dtype, name) is None:
        return f"no tile fits heads of size {head_dim} in {str(dtype).removeprefix('torch.')} on {name}"
    return None


def executor(device, dtype: torch.dtype | None = None, head_dim: int = 64) -> str:
    """What runs where a kernel is asked for, in words: `Triton, compiled for sm_90`, or `PyTorch: ` and why.

    Args:
        dtype: float16 on a GPU and float32 elsewhere by default.
    """
    dtype = dtype or (torch.float16 if torch.device(device).type == "cuda" else torch.float32)
    reason = unsupported(device, dtype, head_dim)
    return f"Triton {triton.__version__}, compiled for {target(device)}" if reason is None else f"PyTorch: {reason}"


def said_once(kernel: str, reason: str | None, device) -> bool:
    """Whether the reference must run; on a GPU the reason is a warning, the first time it is met."""
    if reason is not None and torch.device(device).type == "cuda" and (kernel, reason) not in _warned:
        _warned.add((kernel, reason))
        _warn(kernel, reason)
    return reason is not None


def _warn(kernel: str, reason: str) -> None:
    """To the caller of the kernel, two calls further out."""
    warnings.warn(f"surgery.kernels.{kernel}: PyTorch runs in place of the kernel: {reason}", stacklevel=4)


def started(kernel: str, device, launch, kind: str = "") -> bool:
    """Launch a kernel; False, with a warning, where it cannot be: the reference must run, here and from then on.

    A compiler that is missing or fails, or a tile that this GPU has no room for, must not cost a prompt. Interpreted,
    a kernel's errors are its own, for tests to see.

    Args:
        kind: what else decides what is compiled (dtype, sizes): another kind may still start.
    """
    place = kernel, str(device), kind
    if place in _broken:
        return False
    try:
        launch()
    except Exception as error:  # Triton, a C compiler and a driver raise what they like
        if INTERPRETED or isinstance(error, torch.OutOfMemoryError):
            raise
        _broken[place] = in_a_line(error)
        _warn(kernel, _broken[place])
        return False
    return True


def in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def failed(kernel: str = "") -> list[str]:
    """What could not be launched in this process, of one kernel or of all: PyTorch ran in its place."""
    return [f"{' '.join(place)}: {why}" for place, why in sorted(_broken.items()) if kernel in ("", place[0])]


def check(kernel: str, query, key, value, pad=None):
    """Refuse what no kernel of [batch, heads, length, head_dim] can mean. Returns `pad` as kernels read it.

    Raises:
        ValueError: shapes, types or devices that do not fit together, or tensors that want a gradient.
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
    """Where output and log-sum-exp go: as given, else new. Every element of them is written by the caller."""
    shape = query.shape
    out = torch.empty_like(query) if out is None else out
    lse = torch.empty(shape[:3], dtype=torch.float32, device=query.device) if lse is None else lse
    if out.shape != shape or out.dtype != query.dtype or lse.shape != shape[:3] or lse.dtype != torch.float32:
        raise ValueError("out is shaped as the query, of its dtype; lse is float32 [batch, heads, n]")
    return out, lse


def put(pair, out, lse):
    """A reference's result in the tensors that were handed in, if any were."""
    return tuple(new if old is None else old.copy_(new) for new, old in zip(pair, (out, lse), strict=True))


def capped(scores, softcap: float | None):
    """Soft-capped scores of a reference; as they are where there is no cap."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def masked_softmax(scores, seen):
    """A reference's weights and natural log-sum-exp over the last dimension: 0 and -inf where no key is seen."""
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    return (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp(), lse


def of_prefill(kernel, tile: tuple, types: dict, head_dim: int, dtype: torch.dtype, name: str) -> dict:
    """`variants` of a prefill kernel that needs no lists of blocks.

    Args:
        types: of the arguments that it has beside query, keys, values, output and log-sum-exp.
    """
    rows, keys, warps, stages = tile
    types = dict.fromkeys(("Q", "K", "V", "OUT"), dtype) | {"LSE": "*fp32"} | types
    fixed = {"GROUP": 3, "D": head_dim, "BM": rows, "BN": keys, "BD": padded_size(head_dim), "UPCAST": False}
    fixed["PRECISION"] = precision(dtype, name)
    options = {"num_warps": warps, "num_stages": stages}
    plain, full = {"CAPPED": False, "PADDED": False, "PAD": None}, {"CAPPED": True, "PADDED": True}
    return {
        "plain": (kernel, types, fixed | plain, options),
        "pad, soft-cap": (kernel, types | {"PAD": "*i64"}, fixed | full, options),
    }


def factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """`factor` and `cap` of `tile_scores`, which works in base 2."""
    if softcap is None:
        return scale * LOG2E, 0.0
    return 2 * LOG2E * scale / softcap, softcap * LOG2E


def upcast(dtype: torch.dtype) -> bool:
    """Whether the interpreter must multiply in float32: its product of two bfloat16 tiles is wrong (triton 3.9)."""
    return INTERPRETED and dtype == torch.bfloat16


def precision(dtype: torch.dtype, name: str) -> str:
    """How `tl.dot` multiplies float32. NVIDIA's full precision has no tensor cores and spills; three of tf32 fit."""
    return "tf32x3" if dtype == torch.float32 and name.startswith("sm_") else "ieee"


def padded_size(head_dim: int) -> int:
    """The power of two that a tile's head size is filled up to: `tl.dot` takes no other, and none below 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def on_device(tensor):
    """Launch where the tensor is, not on the process's current GPU."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


@jit
def load_tile(at, inside, real, WHOLE: tl.constexpr, UPCAST: tl.constexpr):
    """Load a tile; 0 outside of `inside` and, where the head size is filled up (not WHOLE), outside of `real`."""
    if WHOLE:
        tile = tl.load(at, mask=inside, other=0.0)
    else:
        tile = tl.load(at, mask=inside & real, other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@jit
def tile_scores(q, k, factor, cap, CAPPED: tl.constexpr, PRECISION: tl.constexpr):
    """Scores in base 2 of a tile of queries [rows, d] and keys [d, keys]; soft-capped: cap * tanh(score / cap)."""
    scores = tl.dot(q, k, input_precision=PRECISION) * factor
    if CAPPED:
        scores = cap * (1.0 - 2.0 / (tl.exp2(scores) + 1.0))
    return scores


@jit
def softmax_step(scores, seen, v, top, total, acc, PRECISION: tl.constexpr):
    """Take one tile of scores [rows, keys] and values [keys, d] into the running softmax of the rows.

    `top` is the largest score yet, `total` the sum of 2^(score - top). A row that has seen no key keeps top = -inf;
    subtracting that from itself would be NaN, hence the 0 in its place.
    """
    scores = tl.where(seen, scores, float("-inf"))
    new = tl.maximum(top, tl.max(scores, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(scores - safe[:, None])
    decay = tl.exp2(top - safe)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return new, total * decay + tl.sum(p, 1), acc


@jit
def softmax_end(top, total, acc):
    """Output [rows, d] and natural log-sum-exp [rows]: 0 and -inf in a row that has seen no key."""
    some = total > 0.0
    total = tl.where(some, total, 1.0)
    lse = tl.where(some, (top + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    return acc / total[:, None], lse

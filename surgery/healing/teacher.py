"""The base as the teacher of a converted model: in memory, or stored on disk before the training.

A teacher gives only the values of the base that the losses of `heal.loss` need: with `loss: ce` no teacher runs.

A stored teacher keeps the base's most probable tokens on disk, for every row that the student will read. Storing takes
one pass of the base, which is not needed afterwards.

For each prediction it has the k largest log-probabilities, their tokens, and the log of the mass of all other tokens.
This is a distribution over k + 1 outcomes. Rows are found by a hash of their tokens and positions, so that a training
gets the right row in any order.

Files: `teacher.json` names the base, the data and the settings. Each safetensors file holds some rows, and is either
complete or missing, so that a killed run resumes with the next file.
"""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import nullcontext
from pathlib import Path

import torch

from surgery.data.packing import arguments
from surgery.errors import ModelMismatchError, SettingError, SurgeryError
from surgery.healing import losses
from surgery.healing.contexts import autocast_products
from surgery.healing.losses.base import BaseLogits, BaseTopK, LossInputs, predicts
from surgery.healing.losses.objective import measure
from surgery.io.files import write_json
from surgery.io.loading import eval_mode
from surgery.io.output_folder import machine_errors
from surgery.io.resume import LayerFiles, fingerprint
from surgery.machine.progress import begin


class Teacher:
    """The teacher for losses that need no base. A subclass adds the values of the base."""

    def loss(self, outputs, batch: dict, heal, count: int | None = None) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss of one forward of the student.

        Args:
            outputs: the student's outputs, from a call with `arguments(student, batch, heal.reads_states)`.
            batch: `Packed` rows, tensors [batch, length].
            heal: its losses, its temperature and `sure` are read.
            count: number of tokens to average over, where a step has several batches; default this batch's.

        Returns:
            The weighted loss, and the unweighted mean of each loss by name: "ce" and "kl" in nats a token (KL times
            T²), "hidden" as a share of the hidden states' energy.
        """
        labels = batch["labels"].to(outputs.logits.device)
        base, base_states = self.ask(outputs.logits, batch, heal) if heal.loss_needs else (None, None)
        states = outputs.hidden_states[1:] if heal.reads_states else None
        inputs = LossInputs(predicts(labels), labels, base, states, base_states, heal.temperature, heal.sure)
        weighted = {name: (weight, losses.find(name)) for name, weight in heal.weights.items()}
        loss, means = measure(outputs.logits, weighted, inputs, count)
        return loss, {name: float(mean.detach()) for name, mean in means.items()}

    def ask(self, logits: torch.Tensor, batch: dict, heal) -> tuple[BaseLogits | BaseTopK | None, tuple | None]:
        """The base's probabilities, and its hidden states after each layer, if the losses need them (`loss_needs`).

        Raises:
            SurgeryError: there is no teacher, or it lacks a value that the losses need.
        """
        word = isinstance(heal.loss, str) and heal.loss == "ce"
        raise SettingError(
            "a teacher is needed, and there is none",
            where=f"heal.hidden: {heal.hidden:g}" if word else f"heal.loss: {losses.written(heal.loss)}",
            fix="name the base: --base MODEL",
        )


class LiveTeacher(Teacher):
    """The base in memory. It is put in eval mode and its weights are frozen, permanently."""

    def __init__(self, model):
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def ask(self, logits, batch, heal):
        device = self.model.device
        inputs = {name: tensor.to(device) for name, tensor in batch.items() if isinstance(tensor, torch.Tensor)}
        with autocast_products(heal, device):
            outputs = self.model(**arguments(self.model, inputs, heal.reads_states))
        refuse_vocabulary(logits.shape[-1], outputs.logits.shape[-1])
        base = BaseLogits(outputs.logits) if heal.reads_probabilities else None
        return base, outputs.hidden_states[1:] if heal.reads_states else None


class StoredTeacher(Teacher):
    """The base's predictions that `store` wrote: the most probable tokens of every row, and the mass of all others."""

    def __init__(self, folder: str | Path):
        self.stored = TopK(Path(folder))

    def ask(self, logits, batch, heal):
        info = self.stored.info
        for name in heal.weights:
            if lacking := losses.find(name).not_stored:
                raise SettingError(
                    f"a stored teacher has no {lacking}",
                    where=f"heal.loss: {name}",
                    fix="heal.teacher=live, or leave that loss out",
                )
        if heal.temperature != info["temperature"]:
            raise SurgeryError(
                f"the teacher was stored for temperature {info['temperature']:g}, not {heal.temperature:g}",
                where=str(self.stored.folder),
                fix=f"heal.temperature={info['temperature']:g}, or remove the folder to store it again",
                code="unfinished-run",
            )
        refuse_vocabulary(logits.shape[-1], info["vocabulary"])
        rows = self.stored.rows(batch["input_ids"], batch["position_ids"])
        return BaseTopK(rows["values"], rows["indices"], rows["rest"]), None


def refuse_vocabulary(student: int, teacher: int) -> None:
    """Raise where the sizes of the vocabularies differ."""
    if student != teacher:
        raise ModelMismatchError(
            f"model and teacher have different vocabularies: {student} and {teacher} tokens",
            fix="the teacher is the base that the model was made from",
        )


INFO, FORMAT, NAME = "teacher.json", 1, "teacher"
ROWS = 32  # rows in a file
LOGITS = 1 << 27  # most values of one forward's logits


def store(
    model,
    rows,
    folder: str | Path,
    *,
    top_k: int = 64,
    temperature: float = 1.0,
    dtype=torch.float16,
    progress=None,
    within=nullcontext(),
):
    """Store the base's predictions for every row. Existing files stay unchanged.

    Args:
        model: the base, in memory. It runs in eval mode, and its mode is restored.
        rows: a `Packed` data set.
        top_k: number of tokens to keep, at most the vocabulary.
        temperature: the temperature of the distillation.
        dtype: dtype of the log-probabilities on disk; float16 is precise enough (see `TopK`).
        progress: called as progress(done, total, label), in rows.
        within: a context in which the model runs.

    Raises:
        SurgeryError: the folder holds predictions of another base, or for another data set.
        MachineError: the disk is full or not writable; existing files stay.
    """
    folder = Path(folder)
    vocabulary = model.config.get_text_config().vocab_size
    info = {"format": FORMAT, "base": fingerprint(model), "data": rows.sha256, "rows": len(rows)}
    info |= {"length": rows.ids.shape[1], "vocabulary": vocabulary, "top_k": min(top_k, vocabulary)}
    info |= {"temperature": temperature, "dtype": str(dtype).removeprefix("torch."), "rows_in_a_file": ROWS}
    with machine_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_another(folder, info)
        write_json(folder / INFO, info)
        files = _files(folder, info)
        with eval_mode(model):
            begin(progress, "answers of the base", len(rows))
            for file_index in range(math.ceil(len(rows) / ROWS)):
                if not files.path(file_index).is_file():
                    selection = slice(file_index * ROWS, (file_index + 1) * ROWS)
                    tensors = ask(model, rows.ids[selection].long(), rows.positions[selection].long(), info, within)
                    files.save(file_index, tensors, {})
                if progress:
                    progress(min((file_index + 1) * ROWS, len(rows)), len(rows), "answers of the base")


@torch.no_grad()
def ask(model, ids: torch.Tensor, positions: torch.Tensor, info: dict, within) -> dict[str, torch.Tensor]:
    """A model's predictions for rows [r, length]: `values`, `indices` [r, length, k], `rest` [r, length], `keys`."""
    step = max(1, LOGITS // (ids.shape[1] * info["vocabulary"]))
    index_dtype = torch.uint16 if info["vocabulary"] <= 1 << 16 else torch.int32
    columns: dict[str, list] = {"values": [], "indices": [], "rest": []}
    for first in range(0, len(ids), step):
        batch = {"input_ids": ids[first : first + step], "position_ids": positions[first : first + step]}
        inputs = arguments(model, {name: tensor.to(model.device) for name, tensor in batch.items()}, hidden=False)
        with within:
            logits = model(**inputs).logits
        for row in logits:  # one at a time: the largest float32 tensor is [length, V]
            row_tensors = top_k_and_rest(row, info["top_k"], info["temperature"])
            for name, tensor in zip(columns, row_tensors, strict=True):
                columns[name].append(
                    tensor.to(index_dtype if name == "indices" else getattr(torch, info["dtype"])).cpu()
                )
    keys = torch.tensor([list(key) for key in keys_of(ids, positions)], dtype=torch.uint8)
    return {name: torch.stack(each) for name, each in columns.items()} | {"keys": keys}


def top_k_and_rest(logits: torch.Tensor, top_k: int, temperature: float) -> tuple[torch.Tensor, ...]:
    """log p of the k most probable tokens [r, k], the tokens [r, k], and the log of the mass of all others [r].

    Args:
        logits: [r, V].
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    log_p = wide.log_softmax(-1)
    values, indices = log_p.topk(top_k, dim=-1)
    return values, indices, log_p.scatter_(1, indices, -math.inf).logsumexp(-1)


def as_distribution(values: torch.Tensor, rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise rounded logs of k probabilities [..., k] and of the rest [...] in float32, so that they sum to 1."""
    values, rest = values.float(), rest.float()
    total = torch.cat([values, rest[..., None]], dim=-1).logsumexp(-1)
    return values - total[..., None], rest - total


def keys_of(ids: torch.Tensor, positions: torch.Tensor) -> list[bytes]:
    """A hash of each row's tokens and positions [rows, length]."""
    both = torch.cat([ids, positions], dim=1).int().cpu().numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in both]


class TopK:
    """A stored teacher's rows, read on demand.

    float16 is precise enough. With 64 tokens of SmolLM2-135M, the gradient differs by 3.05% from the gradient of the
    whole distribution, in float16 as in float32. A token takes 258 bytes instead of 388 (measured by
    `examples/benchmarks/bench_healing.py stored`). The rounded probabilities are normalised when they are read
    (`as_distribution`).
    """

    def __init__(self, folder: Path):
        self.folder, self.info = folder, read_info(folder)
        if self.info is None:
            raise SurgeryError(
                "no stored teacher is here", where=str(folder), fix="heal.teacher=live", code="invalid-file"
            )
        from safetensors import safe_open

        paths = [_files(folder, self.info).path(n) for n in range(math.ceil(self.info["rows"] / ROWS))]
        if lost := [path.name for path in paths if not path.is_file()]:
            raise SurgeryError(
                f"{len(lost)} of {len(paths)} files of the stored teacher are missing, the first is {lost[0]}",
                where=str(folder),
                fix="run the same command with --resume",
                code="invalid-file",
            )
        self._open = [safe_open(path, "pt") for path in paths]
        self._index = {
            bytes(key.tolist()): (file_index, row)
            for file_index, file in enumerate(self._open)
            for row, key in enumerate(file.get_tensor("keys"))
        }

    def rows(self, ids: torch.Tensor, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        """`values` and `indices` [batch, length, k] and `rest` [batch, length] for rows [batch, length], on the CPU.

        Raises:
            SurgeryError: a row is not stored.
        """
        keys = keys_of(ids, positions)
        if any(key not in self._index for key in keys):
            raise SurgeryError(
                "the stored teacher does not know these rows: they come from other data or another packing",
                where=str(self.folder),
                fix="heal.teacher=live, or remove the folder to store it again",
                code="unfinished-run",
            )
        columns: dict[str, list] = {"values": [], "indices": [], "rest": []}
        for file_index, row in map(self._index.get, keys):
            for name, column in columns.items():
                column.append(self._open[file_index].get_slice(name)[row])
        joined = {name: torch.stack(column) for name, column in columns.items()}
        values, rest = as_distribution(joined["values"], joined["rest"])
        return {"values": values, "indices": joined["indices"].int(), "rest": rest}


def read_info(folder: Path) -> dict | None:
    """The base, data and settings of a folder's stored teacher, or None if there is none."""
    path = folder / INFO
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _files(folder: Path, info: dict) -> LayerFiles:
    return LayerFiles(folder, NAME, sorted(info.items()))


def _refuse_another(folder: Path, info: dict) -> None:
    stored = read_info(folder)
    differ = [name for name in info if stored and stored.get(name) != info[name]]
    if differ:
        descriptions = {"base": "another base", "data": "other data", "rows": "other data", "length": "other data"}
        words = dict.fromkeys(
            descriptions.get(name, f"{name} {stored.get(name)}, not {info[name]}") for name in differ
        )
        raise SurgeryError(
            f"the stored teacher here is of {', '.join(words)}",
            where=str(folder),
            fix="choose another folder, or remove this one to store the teacher again",
            code="unfinished-run",
        )

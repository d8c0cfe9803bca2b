"""The base as the teacher of a converted model: run beside it, or asked once before and kept on disk.

Both give what the losses of `heal.loss` need of the base, and no more: with `loss: ce` no teacher runs.

A base's most probable tokens on disk, for every row that a student will see: one pass, then no teacher is needed.

Of each prediction the k largest log-probabilities are kept, their tokens, and the log of the mass of all others, so
that what is kept is a distribution over k + 1 outcomes. Rows are found again by a hash of their tokens and positions:
in whatever order a training asks for them, it cannot get another row's.

Files: `teacher.json` says what it was made of and with; each safetensors file holds some rows, and is complete or not
there, so that a run that was killed goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import nullcontext
from pathlib import Path

import torch

from surgery.data.packing import arguments
from surgery.errors import SurgeryError
from surgery.healing import losses
from surgery.healing.contexts import autocast_products
from surgery.healing.losses.base import BaseLogits, BaseTopK, LossInputs, predicts
from surgery.healing.losses.objective import measure
from surgery.io.files import write_json
from surgery.io.output_folder import machine_errors
from surgery.io.resume import LayerFiles, fingerprint


class Teacher:
    """Serves losses that ask no base; the others add what they know of it."""

    def loss(self, outputs, batch: dict, heal, count: int | None = None) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss of one forward of the student.

        Args:
            outputs: of the student, called with `arguments(student, batch, heal.reads_states)`.
            batch: of `Packed` rows, [batch, length] each.
            heal: its losses and the temperature are read.
            count: tokens to average over, where a step is made of several batches; default those of this one.

        Returns:
            The loss, and each loss's mean before it is weighted, by name: "ce" and "kl" in nats a token (KL times
            T²), "hidden" as a share of the hidden states' energy.
        """
        labels = batch["labels"].to(outputs.logits.device)
        base, base_states = self.ask(outputs.logits, batch, heal) if heal.loss_needs else (None, None)
        states = outputs.hidden_states[1:] if heal.reads_states else None
        inputs = LossInputs(predicts(labels), labels, base, states, base_states, heal.temperature)
        weighted = {name: (weight, losses.find(name)) for name, weight in heal.weights.items()}
        loss, means = measure(outputs.logits, weighted, inputs, count)
        return loss, {name: float(mean.detach()) for name, mean in means.items()}

    def ask(self, logits: torch.Tensor, batch: dict, heal) -> tuple[BaseLogits | BaseTopK | None, tuple | None]:
        """What `heal.asks` of the base: its probabilities, and its hidden states after each layer."""
        word = isinstance(heal.loss, str) and heal.loss == "ce"
        raise SurgeryError(
            "a teacher is needed, and there is none",
            where=f"heal.hidden: {heal.hidden:g}" if word else f"heal.loss: {losses.written(heal.loss)}",
            fix="name the base: --base MODEL",
        )


class LiveTeacher(Teacher):
    """The base in memory. It is put in eval mode and its weights are frozen, for good."""

    def __init__(self, model):
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def ask(self, logits, batch, heal):
        device = self.model.device
        given = {name: tensor.to(device) for name, tensor in batch.items() if isinstance(tensor, torch.Tensor)}
        with autocast_products(heal, device):
            outputs = self.model(**arguments(self.model, given, heal.reads_states))
        refuse_vocabulary(logits.shape[-1], outputs.logits.shape[-1])
        base = BaseLogits(outputs.logits) if heal.reads_probabilities else None
        return base, outputs.hidden_states[1:] if heal.reads_states else None


class StoredTeacher(Teacher):
    """What `store` kept of the base: the most probable tokens of every row, and the mass of all others."""

    def __init__(self, folder: str | Path):
        self.kept = TopK(Path(folder))

    def ask(self, logits, batch, heal):
        facts = self.kept.facts
        for name in heal.weights:
            if lacking := losses.find(name).not_stored:
                raise SurgeryError(
                    f"a stored teacher has no {lacking}",
                    where=f"heal.loss: {name}",
                    fix="heal.teacher=live, or leave that loss out",
                )
        if heal.temperature != facts["temperature"]:
            raise SurgeryError(
                f"the teacher was stored for temperature {facts['temperature']:g}, not {heal.temperature:g}",
                where=str(self.kept.folder),
                fix=f"heal.temperature={facts['temperature']:g}, or remove the folder to store it anew",
            )
        refuse_vocabulary(logits.shape[-1], facts["vocabulary"])
        found = self.kept.rows(batch["input_ids"], batch["position_ids"])
        return BaseTopK(found["values"], found["indices"], found["rest"]), None


def refuse_vocabulary(student: int, teacher: int) -> None:
    if student != teacher:
        raise SurgeryError(
            f"model and teacher have different vocabularies: {student} and {teacher} tokens",
            fix="the teacher is the base that the model was made from",
        )


FACTS, FORMAT, NAME = "teacher.json", 1, "teacher"
ROWS = 32  # in a file
LOGITS = 1 << 27  # values of the logits of a forward


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
    """Keep what the base says of every row; files that are there already are left as they are.

    Args:
        model: the base, in memory; it is run in eval mode and left in the mode that it was in.
        rows: a `Packed` data set.
        top_k: tokens to keep, at most the vocabulary.
        temperature: of the distillation.
        dtype: of the log-probabilities on disk; float16 is right (see `TopK`).
        progress: called as progress(done, total, label), in rows.
        within: a context that the model is run in.

    Raises:
        SurgeryError: the folder holds what another base, or another data set, gave.
        MachineError: the disk is full, or not ours to write on; what is there stays.
    """
    folder = Path(folder)
    vocabulary = model.config.get_text_config().vocab_size
    facts = {"format": FORMAT, "base": fingerprint(model), "data": rows.sha256, "rows": len(rows)}
    facts |= {"length": rows.ids.shape[1], "vocabulary": vocabulary, "top_k": min(top_k, vocabulary)}
    facts |= {"temperature": temperature, "dtype": str(dtype).removeprefix("torch."), "rows_in_a_file": ROWS}
    with machine_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_another(folder, facts)
        write_json(folder / FACTS, facts)
        files, training = _files(folder, facts), model.training
        model.eval()
        try:
            for number in range(math.ceil(len(rows) / ROWS)):
                if not files.path(number).is_file():
                    some = slice(number * ROWS, (number + 1) * ROWS)
                    kept = ask(model, rows.ids[some].long(), rows.positions[some].long(), facts, within)
                    files.save(number, kept, {})
                if progress:
                    progress(min((number + 1) * ROWS, len(rows)), len(rows), "teacher")
        finally:
            model.train(training)


@torch.no_grad()
def ask(model, ids: torch.Tensor, positions: torch.Tensor, facts: dict, within) -> dict[str, torch.Tensor]:
    """What a model says of some rows [r, length]: `values`, `indices` [r, length, k], `rest` [r, length], `keys`."""
    step = max(1, LOGITS // (ids.shape[1] * facts["vocabulary"]))
    small = torch.uint16 if facts["vocabulary"] <= 1 << 16 else torch.int32
    parts: dict[str, list] = {"values": [], "indices": [], "rest": []}
    for first in range(0, len(ids), step):
        batch = {"input_ids": ids[first : first + step], "position_ids": positions[first : first + step]}
        given = arguments(model, {name: tensor.to(model.device) for name, tensor in batch.items()}, hidden=False)
        with within:
            logits = model(**given).logits
        for row in logits:  # one at a time: [length, V] in float32 is the most that is made
            found = top_k_and_rest(row, facts["top_k"], facts["temperature"])
            for name, tensor in zip(parts, found, strict=True):
                parts[name].append(tensor.to(small if name == "indices" else getattr(torch, facts["dtype"])).cpu())
    keys = torch.tensor([list(key) for key in keys_of(ids, positions)], dtype=torch.uint8)
    return {name: torch.stack(each) for name, each in parts.items()} | {"keys": keys}


def top_k_and_rest(logits: torch.Tensor, top_k: int, temperature: float) -> tuple[torch.Tensor, ...]:
    """log p of the k most probable tokens [r, k], these tokens, and the log of the mass of all others [r].

    Args:
        logits: [r, V].
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    log_p = wide.log_softmax(-1)
    values, indices = log_p.topk(top_k, dim=-1)
    return values, indices, log_p.scatter_(1, indices, -math.inf).logsumexp(-1)


def as_distribution(values: torch.Tensor, rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounded logs of k probabilities [..., k] and of the rest [...], in float32, so that they sum to 1 again."""
    values, rest = values.float(), rest.float()
    total = torch.cat([values, rest[..., None]], dim=-1).logsumexp(-1)
    return values - total[..., None], rest - total


def keys_of(ids: torch.Tensor, positions: torch.Tensor) -> list[bytes]:
    """A hash of each row's tokens and positions [rows, length]."""
    both = torch.cat([ids, positions], dim=1).int().cpu().numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in both]


class TopK:
    """A stored teacher's rows, read as they are asked for.

    float16 holds what is needed: with 64 tokens of SmolLM2-135M the gradient is 3.05% off that of the whole
    distribution in either precision, and a token takes 258 bytes in place of 388 (measured by
    `examples/benchmarks/bench_healing.py stored`).
    What rounding makes of the mass is put right here.
    """

    def __init__(self, folder: Path):
        self.folder, self.facts = folder, read_facts(folder)
        if self.facts is None:
            raise SurgeryError("no stored teacher is here", where=str(folder), fix="heal.teacher=live")
        from safetensors import safe_open

        paths = [_files(folder, self.facts).path(n) for n in range(math.ceil(self.facts["rows"] / ROWS))]
        if lost := [path.name for path in paths if not path.is_file()]:
            raise SurgeryError(
                f"{len(lost)} of {len(paths)} files of the stored teacher are missing, the first is {lost[0]}",
                where=str(folder),
                fix="run the same command with --resume",
            )
        self._open = [safe_open(path, "pt") for path in paths]
        self._place = {
            bytes(key.tolist()): (number, row)
            for number, file in enumerate(self._open)
            for row, key in enumerate(file.get_tensor("keys"))
        }

    def rows(self, ids: torch.Tensor, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        """`values` and `indices` [batch, length, k], `rest` [batch, length] of these rows [batch, length], on the CPU.

        Raises:
            SurgeryError: a row that the teacher was not asked about.
        """
        keys = keys_of(ids, positions)
        if any(key not in self._place for key in keys):
            raise SurgeryError(
                "the stored teacher does not know these rows: they are of other data, or packed otherwise",
                where=str(self.folder),
                fix="heal.teacher=live, or remove the folder to store it anew",
            )
        found: dict[str, list] = {"values": [], "indices": [], "rest": []}
        for number, row in map(self._place.get, keys):
            for name, parts in found.items():
                parts.append(self._open[number].get_slice(name)[row])
        joined = {name: torch.stack(parts) for name, parts in found.items()}
        values, rest = as_distribution(joined["values"], joined["rest"])
        return {"values": values, "indices": joined["indices"].int(), "rest": rest}


def read_facts(folder: Path) -> dict | None:
    """What a folder's teacher was made of, or None if there is none."""
    path = folder / FACTS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _files(folder: Path, facts: dict) -> LayerFiles:
    return LayerFiles(folder, NAME, sorted(facts.items()))


def _refuse_another(folder: Path, facts: dict) -> None:
    there = read_facts(folder)
    differ = [name for name in facts if there and there.get(name) != facts[name]]
    if differ:
        named = {"base": "another base", "data": "other data", "rows": "other data", "length": "other data"}
        words = dict.fromkeys(named.get(name, f"{name} {there.get(name)}, not {facts[name]}") for name in differ)
        raise SurgeryError(
            f"the stored teacher here is of {', '.join(words)}",
            where=str(folder),
            fix="choose another folder, or remove this one to store the teacher anew",
        )

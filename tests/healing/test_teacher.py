"""Teachers: the loss they give, what they do not compute, and the stored one's files: killed, or of another base."""

from __future__ import annotations

import copy

import pytest
import torch
from families import TINY, one_thread  # noqa: F401 (one_thread: a fixture)

from surgery.config.heal import Heal
from surgery.data.packing import Packed, arguments
from surgery.errors import MachineError, SurgeryError
from surgery.healing import teacher as stored
from surgery.healing.losses.base import predicts
from surgery.healing.losses.ce import cross_entropy
from surgery.healing.losses.hidden import hidden_mse
from surgery.healing.losses.kl import distillation, distillation_top_k
from surgery.healing.teacher import LiveTeacher, StoredTeacher, Teacher, store

LENGTH = 16


def heal(**fields):
    """Settings that are not checked: `mix` may stand beside any loss."""
    return Heal.model_construct(**({"precision": "float32"} | fields))


def packed(seed=0, count=30):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (count,), generator=generator).tolist()
    return Packed([torch.randint(3, 128, (n,), generator=generator).tolist() for n in lengths], LENGTH)


def batch_of(rows, numbers):
    items = [rows[number] for number in numbers]
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


@pytest.fixture(scope="module")
def models():
    """A student and its base: two tiny models of one shape."""
    return TINY["llama"](), TINY["llama"](seed=9)


@pytest.fixture
def rows():
    return packed()


@pytest.fixture
def files_of_four(monkeypatch):
    monkeypatch.setattr(stored, "ROWS", 4)


def run(model, batch, hidden=False):
    return model(**arguments(model, batch, hidden))


@pytest.mark.parametrize("loss", ["ce", "distill", "both"])
@pytest.mark.parametrize("hidden", [0.0, 0.2])
def test_a_live_teacher_gives_the_loss_that_is_asked_for(models, rows, loss, hidden):
    student, base = models
    batch, asked = batch_of(rows, [1, 4, 2]), heal(loss=loss, hidden=hidden, mix=0.3)
    outputs = run(student, batch, hidden > 0)
    found, parts = LiveTeacher(copy.deepcopy(base)).loss(outputs, batch, asked)
    with torch.no_grad():
        taught = run(base, batch, True)
        kept = predicts(batch["labels"])
        ce = cross_entropy(outputs.logits, batch["labels"]).item()
        kl = distillation(outputs.logits, taught.logits, kept).item()
        apart = hidden_mse(outputs.hidden_states[1:], taught.hidden_states[1:], kept).item() if hidden else 0.0
    want = {"ce": ce, "distill": kl, "both": 0.3 * ce + 0.7 * kl}[loss] + hidden * apart
    assert found.item() == pytest.approx(want, rel=1e-5)
    known = {"ce": ce, "kl": kl, "hidden": apart}
    assert parts == pytest.approx({name: known[name] for name in parts}, rel=1e-5)
    names = {"ce": {"ce"}, "distill": {"kl"}, "both": {"ce", "kl"}}[loss] | ({"hidden"} if hidden else set())
    assert parts.keys() == names


def test_the_gradient_is_that_of_the_whole_formula(models, rows):
    """Through autograd's own softmax, hidden states included."""
    student, base = (copy.deepcopy(model).double() for model in models)
    batch, asked = batch_of(rows, [0, 3]), heal(loss="both", hidden=0.2, mix=0.3, temperature=2.0)
    student.requires_grad_(True)
    LiveTeacher(base).loss(run(student, batch, True), batch, asked)[0].backward()
    found = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    ours, theirs = run(student, batch, True), run(base, batch, True)
    kept = predicts(batch["labels"])
    log_q, log_p = ((out.logits[kept] / 2).log_softmax(-1) for out in (ours, theirs))
    ce = torch.nn.functional.cross_entropy(ours.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    kl = 4 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    pairs = list(zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True))
    apart = sum(((s - t).square().sum(-1) / t.square().sum(-1))[kept].mean() for s, t in pairs) / len(pairs)
    (0.3 * ce + 0.7 * kl + 0.2 * apart).backward()
    for name, p in student.named_parameters():
        assert (found[name] - p.grad).abs().max() <= 1e-10 * (1 + p.grad.abs().max()), name


def test_batches_of_a_step_add_up_to_its_mean(models, rows):
    student, base = models
    teacher, asked = LiveTeacher(copy.deepcopy(base)), heal(loss="both")
    whole = batch_of(rows, range(6))
    count = int(predicts(whole["labels"]).sum())
    want = teacher.loss(run(student, whole), whole, asked)[0].item()
    parts = [batch_of(rows, some) for some in ([0], [1, 2, 3], [4, 5])]
    found = sum(teacher.loss(run(student, part), part, asked, count)[0].item() for part in parts)
    assert found == pytest.approx(want, rel=1e-5)


def test_cross_entropy_asks_no_teacher(models, rows, tmp_path):
    student, base = copy.deepcopy(models)
    store(base, rows, tmp_path, top_k=4)
    live, kept = LiveTeacher(base), StoredTeacher(tmp_path)
    base.forward = kept.stored.rows = None  # a call would raise
    batch = batch_of(rows, [0, 1])
    outputs = run(student, batch)
    for teacher in (Teacher(), live, kept):
        assert teacher.loss(outputs, batch, heal(loss="ce"))[1].keys() == {"ce"}


def test_a_live_teacher_is_frozen(models, rows):
    student, base = copy.deepcopy(models)
    base.train()
    batch = batch_of(rows, [0])
    LiveTeacher(base).loss(run(student.requires_grad_(True), batch), batch, heal())[0].backward()
    assert not base.training
    assert not any(p.requires_grad or p.grad is not None for p in base.parameters())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.usefixtures("files_of_four")
def test_a_stored_teacher_gives_what_the_live_one_does(models, rows, tmp_path, temperature):
    """Of all tokens the same KL; of a few the KL of what is kept, rows in any order."""
    student, base = models
    asked = heal(temperature=temperature)
    batch = batch_of(rows, [9, 2, 14, 5])
    outputs = run(student, batch)
    live = LiveTeacher(copy.deepcopy(base)).loss(outputs, batch, asked)[0].item()
    store(base, rows, tmp_path / "all", top_k=1000, temperature=temperature, dtype=torch.float32)
    assert StoredTeacher(tmp_path / "all").loss(outputs, batch, asked)[0].item() == pytest.approx(live, rel=1e-5)
    store(base, rows, tmp_path / "few", top_k=8, temperature=temperature)
    found = StoredTeacher(tmp_path / "few").loss(outputs, batch, asked)[0].item()
    with torch.no_grad():
        log_p = (run(base, batch).logits.double() / temperature).log_softmax(-1)
    values, indices = log_p.topk(8)
    rest = torch.log1p(-values.exp().sum(-1))
    kept = predicts(batch["labels"])
    want = distillation_top_k(outputs.logits.double(), values, indices, rest, kept, temperature).item()
    assert found == pytest.approx(want, rel=2e-3)
    assert found < live


@pytest.mark.usefixtures("files_of_four")
def test_half_precision_keeps_the_kl(models, rows, tmp_path):
    """The mass is put right after rounding, and the KL is that of float32 to a thousandth."""
    student, base = models
    found = {}
    for dtype in (torch.float16, torch.float32):
        folder = tmp_path / str(dtype)
        store(base, rows, folder, top_k=16, dtype=dtype)
        teacher = StoredTeacher(folder)
        batch = batch_of(rows, range(len(rows)))
        kept = teacher.stored.rows(batch["input_ids"], batch["position_ids"])
        mass = kept["values"].double().exp().sum(-1) + kept["rest"].double().exp()
        assert (mass - 1).abs().max() < 1e-6
        found[dtype] = teacher.loss(run(student, batch), batch, heal())[0].item()
    assert found[torch.float16] == pytest.approx(found[torch.float32], rel=1e-3)


@pytest.mark.usefixtures("files_of_four")
def test_a_killed_pass_goes_on(models, rows, tmp_path):
    _, base = models
    store(base, rows, tmp_path / "whole", top_k=4)

    class Killed(BaseException):
        pass

    def stop(done, *_):
        if done >= 8:
            raise Killed

    base = copy.deepcopy(base)
    with pytest.raises(Killed):
        store(base, rows, tmp_path / "killed", top_k=4, progress=stop)
    with pytest.raises(SurgeryError, match="files of the stored teacher are missing") as missing:
        StoredTeacher(tmp_path / "killed")
    assert "--resume" in str(missing.value)
    asked = []
    base.register_forward_pre_hook(lambda *_: asked.append(1))
    store(base, rows, tmp_path / "killed", top_k=4)
    assert 0 < len(asked) < len(rows) / 4  # the first two files were there
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "killed" / path.name).read_bytes() == path.read_bytes()


def test_another_base_and_other_data_are_refused(models, rows, tmp_path):
    student, base = models
    store(base, rows, tmp_path, top_k=4)
    cases = [(student, rows, {}, "another base"), (base, packed(1), {}, "other data")]
    cases += [(base, rows, {"temperature": 2.0}, "temperature 1.0, not 2.0")]
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for model, data, more, says in cases:
        with pytest.raises(SurgeryError, match=says):
            store(model, data, tmp_path, top_k=4, **more)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
    batch, other = batch_of(rows, [0]), batch_of(packed(1), [0])
    teacher = StoredTeacher(tmp_path)
    with pytest.raises(SurgeryError, match="does not know these rows"):
        teacher.loss(run(student, other), other, heal())
    with pytest.raises(SurgeryError, match="stored for temperature 1, not 2"):
        teacher.loss(run(student, batch), batch, heal(temperature=2.0))
    with pytest.raises(SurgeryError, match="no hidden states"):
        teacher.loss(run(student, batch, True), batch, heal(hidden=0.1))
    with pytest.raises(SurgeryError, match="no stored teacher"):
        StoredTeacher(tmp_path / "nowhere")


def test_a_row_with_other_borders_is_another_row(models, tmp_path):
    """The same tokens in one document and in two."""
    student, base = models
    tokens = list(range(3, 3 + LENGTH))
    store(base, Packed([tokens], LENGTH), tmp_path, top_k=4)
    batch = batch_of(Packed([tokens[:5], tokens[5:]], LENGTH), [0])
    with pytest.raises(SurgeryError, match="does not know these rows"):
        StoredTeacher(tmp_path).loss(run(student, batch), batch, heal())


def test_another_vocabulary_is_refused(models, rows, tmp_path):
    student, _ = models
    base = TINY["llama"](vocab_size=136)
    batch = batch_of(rows, [0])
    store(base, rows, tmp_path, top_k=4)
    for teacher in (LiveTeacher(base), StoredTeacher(tmp_path)):
        with pytest.raises(SurgeryError, match="different vocabularies: 128 and 136"):
            teacher.loss(run(student, batch), batch, heal())


def test_no_teacher_where_one_is_needed(models, rows):
    student, _ = models
    batch = batch_of(rows, [0])
    with pytest.raises(SurgeryError, match="a teacher is needed"):
        Teacher().loss(run(student, batch), batch, heal())


def test_a_full_disk_is_said(models, rows, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("surgery.io.resume.os.replace", full)
    with pytest.raises(MachineError, match="the disk is full"):
        store(models[1], rows, tmp_path, top_k=4)


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "phi3", "gpt_oss", "falcon_alibi", "bloom", "mpt", "opt"])
def test_every_kind_of_family_teaches(family, rows, tmp_path):
    base = TINY[family]()
    batch = batch_of(rows, [0, 1])
    outputs = run(base, batch)
    store(base, rows, tmp_path, top_k=8)
    for teacher in (LiveTeacher(copy.deepcopy(base)), StoredTeacher(tmp_path)):
        assert abs(teacher.loss(outputs, batch, heal())[0].item()) < 2e-5  # it is its own student

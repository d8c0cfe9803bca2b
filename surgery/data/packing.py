"""Documents packed into rows of equal length, none of which can see another.

Positions start anew at every document: Transformers' masks and the surgical runtime find packed rows by that, if the
model is called without an attention mask and with `use_cache=False`. No token is padding. Some families (gpt_oss, opt,
bloom, mpt with Transformers 5) do not pass positions to their masks: to them a row is one text, positions and all.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Iterable, Sequence

import torch

IGNORED = -100  # a label that is not to be predicted
TRIED, ROUNDING = 8, 1e-2  # tokens of a document; share of the logits by which two ways to compute them may differ


class Packed(torch.utils.data.Dataset):
    """Rows of exactly `length` tokens; what does not fill a last row is left out.

    A document that does not fit in what is left of a row is cut, and what follows begins the next row as a document
    of its own, after the tokens that every document begins with. Nothing is drawn at random: the same documents give
    the same rows.

    Args:
        documents: token ids of each; `documents.begin`, if there is one, is what the tokenizer begins a text with.
        length: tokens of a row.
        apart: whether the model reads the documents of a row apart (`reads_apart`); else positions run on through it.

    Each item holds long tensors [length]: `input_ids`; `position_ids`; and `labels`, the tokens themselves, −100 for
    the first token of a document, which nothing in its row can predict.
    """

    def __init__(self, documents: Iterable[Sequence[int]], length: int, apart: bool = True):
        begin = list(getattr(documents, "begin", ()))
        ids, positions, row, places = [], [], [], []
        for document in documents:
            at, lead = 0, []
            while at < len(document):
                piece = [*lead, *document[at : at + length]][: length - len(row)]
                at += max(len(piece) - len(lead), 0)
                row += piece
                places += range(len(piece))
                if len(row) == length:
                    ids.append(torch.tensor(row, dtype=torch.int32))
                    positions.append(torch.tensor(places, dtype=torch.int32))
                    row, places = [], []
                lead = begin
        empty = torch.empty(0, length, dtype=torch.int32)
        self.ids = torch.stack(ids) if ids else empty
        places = torch.stack(positions) if ids else empty
        self.starts = places == 0  # of documents
        self.positions = places if apart else torch.arange(length, dtype=torch.int32).expand_as(places).contiguous()

    def some(self, numbers: Sequence[int]) -> Packed:
        """These rows alone, in this order."""
        found = copy.copy(self)
        found.ids, found.positions, found.starts = (part[numbers] for part in (self.ids, self.positions, self.starts))
        return found

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        ids = self.ids[row].long()
        return {
            "input_ids": ids,
            "position_ids": self.positions[row].long(),
            "labels": ids.masked_fill(self.starts[row], IGNORED),
        }

    @property
    def sha256(self) -> str:
        """Of all rows: two data sets of one hash train alike."""
        digest = hashlib.sha256(repr(tuple(self.ids.shape)).encode())
        for tensor in (self.ids, self.positions, self.starts):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


@torch.no_grad()
def reads_apart(model) -> bool:
    """Whether a model in memory reads the documents of a row as if each were alone: one of two documents is tried."""
    vocabulary, training = model.config.get_text_config().vocab_size, model.training
    ids = torch.randint(vocabulary, (1, 2 * TRIED), generator=torch.Generator().manual_seed(0)).to(model.device)
    places = torch.arange(TRIED, device=model.device).repeat(2)[None]
    model.eval()
    try:
        one = model(**arguments(model, {"input_ids": ids[:, TRIED:], "position_ids": places[:, :TRIED]}, False)).logits
        both = model(**arguments(model, {"input_ids": ids, "position_ids": places}, False)).logits[:, TRIED:]
    except ValueError as error:
        if "not finite" not in str(error):
            raise
        return True  # a router of NaN: the training says so
    finally:
        model.train(training)
    return bool((one - both).norm() <= ROUNDING * (one - one.mean()).norm())


def arguments(model, batch: dict, hidden: bool) -> dict:
    """What to call a student, or a live teacher, with: a batch of `Packed` rows as keyword arguments.

    No cache: rows that hold several documents are found by their positions only without one.

    Args:
        hidden: the hidden states of all layers are wanted, which a loss may read.
    """
    given = {"input_ids": batch["input_ids"], "use_cache": False}
    if "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = batch["position_ids"]
    return given | ({"output_hidden_states": True} if hidden else {})

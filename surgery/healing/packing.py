"""Documents packed into rows of equal length, none of which can see another.

Positions start anew at every document: Transformers' masks and the surgical runtime find packed rows by that, if the
model is called without an attention mask and with `use_cache=False`. No token is padding.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Sequence

import torch

IGNORED = -100  # a label that is not to be predicted


class Packed(torch.utils.data.Dataset):
    """Rows of exactly `length` tokens; what does not fill a last row is left out.

    A document that does not fit in what is left of a row is cut, and what follows begins the next row as a document
    of its own, after the tokens that every document begins with. Nothing is drawn at random: the same documents give
    the same rows.

    Args:
        documents: token ids of each; `documents.begin`, if there is one, is what the tokenizer begins a text with.
        length: tokens of a row.

    Each item holds long tensors [length]: `input_ids`; `position_ids`; and `labels`, the tokens themselves, −100 for
    the first token of a document, which nothing in its row can predict.
    """

    def __init__(self, documents: Iterable[Sequence[int]], length: int):
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
        self.positions = torch.stack(positions) if ids else empty

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        ids, positions = self.ids[row].long(), self.positions[row].long()
        return {
            "input_ids": ids,
            "position_ids": positions,
            "labels": ids.masked_fill(positions == 0, IGNORED),
        }

    @property
    def sha256(self) -> str:
        """Of all rows: two data sets of one hash train alike."""
        digest = hashlib.sha256(repr(tuple(self.ids.shape)).encode())
        for tensor in (self.ids, self.positions):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def arguments(model, batch: dict, hidden: bool) -> dict:
    """What to call a student, or a live teacher, with: a batch of `Packed` rows as keyword arguments.

    No cache: rows that hold several documents are found by their positions only without one. A family whose forward
    takes no positions (bloom, mpt) reads a packed row as one text.

    Args:
        hidden: the hidden states of all layers are wanted, for `heal.hidden`.
    """
    given = {"input_ids": batch["input_ids"], "use_cache": False}
    if "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = batch["position_ids"]
    return given | ({"output_hidden_states": True} if hidden else {})

"""Documents packed into rows of equal length, so that no document sees another.

Positions begin at 0 again for every document. By these positions, Transformers' masks and the surgical runtime detect
packed rows, if the model is called without an attention mask and with `use_cache=False`. No token is padding. Some
families (gpt_oss, opt, bloom, mpt with Transformers 5) do not pass positions to their masks: they read a row as one
text.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import random
from collections.abc import Iterable, Sequence

import torch

from surgery.io.loading import eval_mode

IGNORED = -100  # the label of tokens that are not predicted
TRIED, ROUNDING = 8, 1e-2  # tokens of a trial document; relative difference of logits that counts as rounding


class Packed(torch.utils.data.Dataset):
    """Rows of exactly `length` tokens; tokens that do not fill a last row are left out.

    A document that does not fit in the rest of a row is cut. Its remainder begins the next row as a separate document,
    after the tokens with which every document begins. Nothing is random: the same documents give the same rows.

    Args:
        documents: token ids of each document; `documents.begin`, if it exists, are the tokens that begin a text.
        length: tokens of a row.
        isolated: whether the model separates the documents of a row (`isolates_documents`). If not, positions count
            through the whole row.

    Each item holds long tensors [length]: `input_ids`, `position_ids` and `labels`. The labels are the tokens
    themselves, and −100 for the first token of a document, which no token of its row can predict.
    """

    def __init__(self, documents: Iterable[Sequence[int]], length: int, isolated: bool = True):
        begin = list(getattr(documents, "begin", ()))
        ids, positions, row, row_positions = [], [], [], []
        for document in documents:
            start, prefix = 0, []
            while start < len(document):
                chunk = [*prefix, *document[start : start + length]][: length - len(row)]
                start += max(len(chunk) - len(prefix), 0)
                row += chunk
                row_positions += range(len(chunk))
                if len(row) == length:
                    ids.append(torch.tensor(row, dtype=torch.int32))
                    positions.append(torch.tensor(row_positions, dtype=torch.int32))
                    row, row_positions = [], []
                prefix = begin
        empty = torch.empty(0, length, dtype=torch.int32)
        self.ids = torch.stack(ids) if ids else empty
        own_positions = torch.stack(positions) if ids else empty
        through = torch.arange(length, dtype=torch.int32).expand_as(own_positions).contiguous()
        self.starts = own_positions == 0  # starts of documents
        self.positions = own_positions if isolated else through
        self.repeating = torch.zeros(len(self.ids), dtype=torch.bool)  # rows in which something comes back

    def mixed_with(self, repeating: Packed, seed: int) -> Packed:
        """These rows and `repeating` ones, which are marked as such, at random indices; both keep their order."""
        mixed, count = copy.copy(self), len(self) + len(repeating)
        mixed.repeating = torch.zeros(count, dtype=torch.bool)
        mixed.repeating[random.Random(f"{seed} mixed").sample(range(count), len(repeating))] = True
        for name in ("ids", "positions", "starts"):
            own, other = getattr(self, name), getattr(repeating, name)
            tensor = own.new_empty(count, own.shape[1])
            tensor[mixed.repeating], tensor[~mixed.repeating] = other, own
            setattr(mixed, name, tensor)
        return mixed

    def select(self, rows: Sequence[int]) -> Packed:
        """These rows alone, in this order."""
        selected = copy.copy(self)
        for name in ("ids", "positions", "starts", "repeating"):
            setattr(selected, name, getattr(self, name)[rows])
        return selected

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
        """The hash of all rows. Two data sets with the same hash give the same training."""
        digest = hashlib.sha256(repr(tuple(self.ids.shape)).encode())
        for tensor in (self.ids, self.positions, self.starts, *([self.repeating] if self.repeating.any() else [])):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


@torch.no_grad()
def isolates_documents(model) -> bool:
    """Whether a model in memory reads each document of a row as if it were alone, by a trial with two documents."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, 2 * TRIED), generator=torch.Generator().manual_seed(0)).to(model.device)
    positions = torch.arange(TRIED, device=model.device).repeat(2)[None]
    second = {"input_ids": ids[:, TRIED:], "position_ids": positions[:, :TRIED]}
    try:
        with eval_mode(model):
            single = model(**arguments(model, second, False)).logits
            packed = model(**arguments(model, {"input_ids": ids, "position_ids": positions}, False)).logits[:, TRIED:]
    except ValueError as error:
        if "not finite" not in str(error):
            raise
        return True  # a router gives NaN, which the training reports
    return bool((single - packed).norm() <= ROUNDING * (single - single.mean()).norm())


def arguments(model, batch: dict, hidden: bool) -> dict:
    """The keyword arguments with which a student or a live teacher is called on a batch of `Packed` rows.

    They turn the cache off: only without one does a model detect rows of several documents by their positions.

    Args:
        hidden: also return the hidden states of all layers, which a loss may read.
    """
    inputs = {"input_ids": batch["input_ids"], "use_cache": False}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = batch["position_ids"]
    return inputs | ({"output_hidden_states": True} if hidden else {})

"""Massive activations: a few values of the residual stream that are far larger than all others.

Source: Sun et al. 2024, "Massive Activations in Large Language Models", arXiv 2402.17762. A value of the hidden states
after a layer is massive if its magnitude is above 100 and at least 1,000 times the median magnitude of the hidden
states there. They lie in few channels, at the first token and at a few others (full stops, line ends), and hardly
depend on the text. So a kind of massive activation is a channel, at the first token or at later ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from surgery.architecture.anatomy import Anatomy
from surgery.calibration.layerwise import decoder_layers, ended

MAGNITUDE, RATIO = 100.0, 1000.0
PLACES = 4  # tokens that are listed for a massive activation

Kind = tuple[int, bool]  # channel, and whether at the first token of a text


@dataclass(frozen=True)
class Massive:
    """One kind of massive activation.

    Attributes:
        channel: its channel of the residual stream.
        first: whether it is at the first token of a text; False: at later tokens.
        layer: the layer after which it appears first, in most texts.
        last: the last layer after which it is massive in any text.
        value: its mean over the texts where it appears first, with its sign.
        magnitude, ratio: the largest magnitude after any layer, and the largest multiple of the median.
        texts, count: number of texts and of tokens with it.
        places: the most frequent of these tokens: token, position, count.
    """

    channel: int
    first: bool
    layer: int
    last: int
    value: float
    magnitude: float
    ratio: float
    texts: int
    count: int
    places: tuple[dict[str, Any], ...]

    @property
    def kind(self) -> Kind:
        """Channel, and whether at the first token."""
        return self.channel, self.first


def relative_sizes(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The magnitudes of the hidden states of one text, and their multiples of the median magnitude.

    Args:
        hidden: [n, channels].

    Returns:
        Two tensors [n, channels], float32 or wider.
    """
    sizes = hidden.to(torch.promote_types(hidden.dtype, torch.float32)).abs()
    return sizes, sizes / sizes.median().clamp(min=torch.finfo(torch.float32).tiny)


def find_massive(
    model: Any,
    sequences: torch.Tensor,
    *,
    magnitude: float = MAGNITUDE,
    ratio: float = RATIO,
    most: int = 16,
    name: Callable[[int], str] = str,
) -> tuple[list[Massive], dict[str, Any]]:
    """Find the massive activations of a model.

    Args:
        model: in memory and in eval mode; it is not changed.
        sequences: tokens, long [texts, n].
        magnitude, ratio: a massive activation has a magnitude above the first, and at least the second times the
            median.
        most: how many kinds to return.
        name: turns a token into text.

    Returns:
        The kinds of massive activations, those with the largest magnitude first; and the largest magnitude of all:
        layer, channel, position, token, magnitude, ratio ({} if the model gives NaN).
    """
    seen: dict[Kind, _Seen] = {}
    largest: dict[str, Any] = {}

    def after(layer: int, hidden: torch.Tensor) -> None:
        ids = sequences[text]
        sizes, ratios = relative_sizes(hidden)
        index = int(sizes.argmax())
        position, channel = divmod(index, hidden.shape[1])
        if (size := sizes[position, channel].item()) > largest.get("magnitude", -1.0):
            largest.update(layer=layer, channel=channel, position=position, token=name(int(ids[position])))
            largest.update(magnitude=size, ratio=ratios[position, channel].item())
        for position, channel in ((sizes > magnitude) & (ratios >= ratio)).nonzero().tolist():
            found = seen.setdefault((channel, position == 0), _Seen())
            value, relative = hidden[position, channel].item(), ratios[position, channel].item()
            found.add(layer, text, position, value, relative)

    with torch.no_grad(), _watched(model, after) as blocks:
        for text in range(len(sequences)):
            with ended(blocks[-1]):
                model(input_ids=sequences[text][None].to(model.device), use_cache=False)
    kinds = [found.summed_up(kind, sequences, name) for kind, found in seen.items()]
    return sorted(kinds, key=lambda each: (-each.magnitude, each.kind))[:most], largest


class _Seen:
    """All that was seen of one kind of massive activation."""

    def __init__(self):
        self.starts: dict[tuple[int, int], tuple[int, float]] = {}  # (text, position) -> first layer, value there
        self.last, self.magnitude, self.ratio = 0, 0.0, 0.0

    def add(self, layer: int, text: int, position: int, value: float, ratio: float) -> None:
        self.starts.setdefault((text, position), (layer, value))
        self.last = max(self.last, layer)
        self.magnitude, self.ratio = max(self.magnitude, abs(value)), max(self.ratio, ratio)

    def summed_up(self, kind: Kind, sequences: torch.Tensor, name: Callable[[int], str]) -> Massive:
        layers = Counter(layer for layer, _ in self.starts.values())
        layer = min(layers, key=lambda index: (-layers[index], index))
        places = Counter((int(sequences[text, position]), position) for text, position in self.starts)
        shown = tuple(
            {"token": name(token), "position": position, "count": count}
            for (token, position), count in sorted(places.items(), key=lambda item: (-item[1], item[0][1]))[:PLACES]
        )
        value = sum(value for _, value in self.starts.values()) / len(self.starts)
        texts = len({text for text, _ in self.starts})
        sizes = {"value": value, "magnitude": self.magnitude, "ratio": self.ratio}
        return Massive(*kind, layer=layer, last=self.last, **sizes, texts=texts, count=len(self.starts), places=shown)


@contextmanager
def massive_set(
    model: Any, values: Mapping[Kind, float], *, magnitude: float = MAGNITUDE, ratio: float = RATIO
) -> Iterator[Counter]:
    """Set massive activations of these kinds to a value, each after the layer where it first appears in its text.

    Every forward must read one text, without padding and without a cache. An activation is set once and not again
    after later layers.

    Args:
        values: kind -> value; other activations are unchanged.
        magnitude, ratio: as for `find_massive`.

    Yields:
        How many activations were set so far, by kind.
    """
    done: set[tuple[int, int]] = set()
    counts: Counter = Counter()

    def after(layer: int, hidden: torch.Tensor) -> None:
        if layer == 0:
            done.clear()
        sizes, ratios = relative_sizes(hidden)
        for place in ((sizes > magnitude) & (ratios >= ratio)).nonzero().tolist():
            position, channel = place
            kind = channel, position == 0
            if kind in values and (position, channel) not in done:
                done.add((position, channel))
                hidden[position, channel] = values[kind]
                counts[kind] += 1

    with _watched(model, after, change=True):
        yield counts


@contextmanager
def _watched(model: Any, after: Callable[[int, torch.Tensor], None], change: bool = False) -> Iterator[Sequence[Any]]:
    """Call `after` with each layer's index and the hidden states [n, channels] after it; yields the layers' modules.

    Args:
        change: whether `after` may change the hidden states in place, for the layers that follow.
    """
    blocks = decoder_layers(model, Anatomy.of(model))

    def hook(layer: int):
        def of_layer(_, args, out):
            hidden = out[0] if isinstance(out, tuple) else out
            hidden = hidden.clone() if change else hidden
            after(layer, hidden[0])
            if not change:
                return None
            return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

        return of_layer

    handles = [block.register_forward_hook(hook(layer)) for layer, block in enumerate(blocks)]
    try:
        yield blocks
    finally:
        for handle in handles:
            handle.remove()

"""One layer's KV heads shared in closed form, from what was seen of it on a calibration text.

What is known of a layer before its KV heads are shared, and the settings of what is fitted to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from surgery.architecture.weights import AttentionLayer
from surgery.calibration.attention_hook import AttentionHook, attention_weights
from surgery.calibration.moments import Moments, Regression, with_ones
from surgery.errors import SurgeryError
from surgery.machine.parallel import parallel_map
from surgery.operations.gqa.conjugate_gradient import solve
from surgery.operations.gqa.cost import efforts
from surgery.operations.gqa.fit_scores import Piece, Rotation, ScoreObjective, project
from surgery.operations.gqa.fit_values import ValuePiece, ValueProblem
from surgery.operations.gqa.layer_inputs import (
    TURNS,
    AttentionCall,
    FitSettings,
    LayerInputs,
    is_validation,
    scale_of,
    share,
    train_and_validation,
)
from surgery.operations.gqa.low_rank import fit_output, merge_keys, merge_values
from surgery.operations.gqa.merge import group_members, pair_channels, stacked, with_bias


class SharedLayer:
    """One layer's conversion."""

    def __init__(self, settings: FitSettings, layer: AttentionLayer, target, seen: LayerInputs, watch: AttentionHook):
        self.settings, self.layer, self.target, self.seen, self.watch = settings, layer, target, seen, watch
        facts = layer.anatomy
        self.groups = group_members(facts, target.kv_heads)
        self._heads: dict[int, torch.Tensor] = {}
        self.key_heads: list[int] = []  # of a layer with a norm after its keys: those that stay
        if not facts.qk_norm:
            self.turn_q, self.turn_k = (self._turn(part) for part in ("q", "k"))

    def convert(self) -> tuple[AttentionLayer, dict]:
        layer, settings = self.layer, self.settings
        record: dict = {}
        moments = self._inputs()
        q, k, v, o = with_bias(layer, "q"), with_bias(layer, "k"), with_bias(layer, "v"), layer.o.double()
        if layer.anatomy.qk_norm:
            parts = self._key_heads(record)
        else:
            q, k = self._keys(q, k, moments, record)
            if refit := [part for part in ("q", "k") if part in settings.refit]:
                q, k = self._fit_scores(q, k, refit, record)
            parts = stacked(layer, "q", list(q)) | stacked(layer, "k", list(k))
        v, o = self._values(v, o, self._read(), record)
        new = layer.replace(anatomy=self.target, **parts, **stacked(layer, "v", list(v)), o=o.to(layer.o.dtype))
        if "v" in settings.refit:  # between two refits of the output projection, the first on the rows of the pieces
            seen = list(self._each(lambda place: self._attention(new, place, self.seen.pieces[place].rows)))
            if "o" in settings.refit:
                new = self._with_output(new, o, record, seen)
            new, o = self._with_values(new, v, seen, record), new.o.double()
        if "o" in settings.refit:
            new = self._with_output(new, o, record)
        return new, record

    def _each(self, work: Callable) -> Iterator:
        """What `work` gives of each piece's number."""
        return parallel_map(work, range(len(self.seen.pieces)), device=self.seen.x[0].device)

    def meet(self, place: int, call: AttentionCall) -> None:
        """From here on the layer's input of a sequence is that of this call."""
        self.seen.x[place], self.seen.calls[place] = with_ones(call.x, self.layer.q_bias is not None), call
        self._heads.pop(place, None)

    def heads(self, layer: AttentionLayer, place: int) -> torch.Tensor:
        """What the heads of the finished layer give on a sequence: [T, H, d]; W_O may change yet."""
        if place not in self._heads:
            rows = torch.arange(len(self.seen.x[place]))
            self._heads[place] = self._mixed(layer, place, self._attention(layer, place, rows))
        return self._heads[place]

    def _mixed(self, layer: AttentionLayer, place: int, weights: torch.Tensor) -> torch.Tensor:
        """Values of a sequence mixed by attention weights [H, r, T]: [r, H, d]."""
        x = self.seen.x[place]
        values = project(with_bias(layer, "v"), x)
        mixed = weights.reshape(len(values), -1, len(x)) @ values
        return mixed.view(*weights.shape[:2], -1).transpose(0, 1)

    def _attention(self, layer: AttentionLayer, place: int, rows: torch.Tensor) -> torch.Tensor:
        """The new layer's attention weights [H, r, T] of some rows of a sequence."""
        query, key = self._turned(layer, place)
        return self._weights_of(query, key, place, rows)

    def _weights_of(self, query: torch.Tensor, key: torch.Tensor, place: int, rows: torch.Tensor) -> torch.Tensor:
        """Attention weights [H, r, T] of queries [H, T, d] and keys [G', T, d] as attention gets them."""
        call, limit = self.seen.base[place], self.watch.windows[self.layer.anatomy.index]
        named = {name: call.settings.get(name) for name in ("softcap", "s_aux")}
        rows = rows.to(query.device)
        return attention_weights(query[None], key[None], rows, scale=scale_of(call), limit=limit, **named)[0]

    def _turned(self, layer: AttentionLayer, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [H, T, d] and keys [G', T, d] as attention gets them."""
        if layer.anatomy.qk_norm:
            call = self.seen.calls[place]
            return call.query, call.key[self.key_heads]
        x = self.seen.x[place]
        return (
            self.turn_q.to(x.dtype)(project(with_bias(layer, "q"), x)),
            self.turn_k.to(x.dtype)(project(with_bias(layer, "k"), x)),
        )

    def _turn(self, part: str) -> Rotation:
        """RoPE of this layer, measured: by what the model's own queries or keys differ from their projection."""
        facts, heads = self.layer.anatomy, with_bias(self.layer, part)
        real, imag = pair_channels(facts.rotary, facts.positions)
        up = down = free_up = free_down = 0.0
        pairs = []
        for call in self.seen.base[:TURNS]:
            before = project(heads, with_ones(call.x, self.layer.q_bias is not None).double())
            after = (call.query if part == "q" else call.key).double()
            z, turned = (torch.complex(t[..., real], t[..., imag]) for t in (before, after))
            up, down = up + (turned * z.conj()).sum(0), down + z.abs().square().sum(0)
            rest = before[..., facts.rotary :], after[..., facts.rotary :]
            free_up, free_down = free_up + (rest[0] * rest[1]).sum(), free_down + rest[0].square().sum()
            pairs.append((before, after))
        free = float(free_up / free_down.clamp(min=1e-30)) if facts.rotary < facts.head_dim else 1.0
        turn = Rotation.of(up / down.clamp(min=1e-30), free, facts.head_dim, facts.positions)
        miss = sum(float((turn(before) - after).square().sum()) for before, after in pairs)
        whole = sum(float(after.square().sum()) for _, after in pairs)
        if miss > 1e-4 * whole:
            name = {"q": "queries", "k": "keys"}[part]
            raise SurgeryError(
                f"layer {facts.index}: the {name} of this model are not its projections turned by RoPE "
                f"({(miss / whole) ** 0.5:.1%} apart)",
                fix="use method: mean",
            )
        return turn

    def _inputs(self) -> Moments:
        """Of the layer's inputs, as keys see them."""
        moments, share = Moments(exact=False), self.settings.received
        for x, piece in zip(self.seen.x, self.seen.pieces, strict=True):
            received = piece.weights.sum((0, 1))
            received = received * (len(x) / received.sum())
            moments.add(x, 1 - share + share * received)
        return moments

    def _read(self) -> Moments:
        """Of what heads read: inputs averaged by the base's attention. Values are averaged before they count.

        Every fourth of the rows is enough.
        """
        moments = Moments(exact=False)
        for x, piece, rms in zip(self.seen.x, self.seen.pieces, self.seen.rms, strict=True):
            rows = piece.rows[::4]
            read = (piece.weights[:, ::4] @ x).flatten(0, 1)
            moments.add(read, _weights(rms[rows]).repeat(len(piece.weights)))
        return moments

    def _keys(self, q, k, moments: Moments, record: dict):
        facts, new, lost, energy = self.layer.anatomy, [], 0.0, 0.0
        second = moments.second.cpu()
        mean = None if facts.layout.sinks else moments.mean.cpu()
        q = q.clone()
        for group in self.groups:
            sources = list(group)
            power = torch.stack([sum(q[j] @ second @ q[j].T for j in readers) for readers in group.values()])
            if not self.settings.weighted:
                power = torch.eye(facts.head_dim, dtype=power.dtype).expand_as(power)
            found = merge_keys(k[sources], second, power, rotary=facts.rotary, positions=facts.positions, mean=mean)
            for turn, readers in zip(found.maps, group.values(), strict=True):
                q[readers] = turn.T @ q[readers]
            new.append(found.head)
            lost, energy = lost + found.lost, energy + found.energy
        record["keys_lost"] = share(lost, energy)
        return q, torch.stack(new)

    def _fit_scores(self, q, k, refit: list[str], record: dict):
        """Queries and keys in turn, nearest to the base's scores: in more and more steps, as early ones are undone."""
        settings, call = self.settings, self.seen.base[0]
        dtype = self.seen.x[0].dtype
        record["scores_lost"] = []
        pieces = self.seen.pieces
        turns = settings.rounds * len(refit) + (len(refit) - 1)
        for turn, effort in enumerate(efforts(turns)):
            if turn and settings.reweight_keys:
                pieces = list(self._each(partial(self._with_risen, q, k)))
            rope = self.turn_q.to(dtype), self.turn_k.to(dtype)
            fit, held = (ScoreObjective(some, scale_of(call), *rope, len(k)) for some in train_and_validation(pieces))
            part = refit[turn % len(refit)]
            given = {"steps": round(effort * settings.steps), "damping": settings.damping}
            if part == "q":
                found = solve(fit.query_problem(k), held.query_problem(k), q, **given)
                q = found.weight
            else:
                found = solve(fit.key_problem(q), held.key_problem(q), k, **given)
                k = found.weight
            record["scores_lost"].append([round(found.before, 6), round(found.after, 6)])
        return q, k

    def _with_risen(self, q, k, place: int) -> Piece:
        """A piece whose keys count by the mean of what the base's attention and that of these weights gives them."""
        piece, x = self.seen.pieces[place], self.seen.x[place]
        key, query = self.turn_k.to(x.dtype)(project(k, x)), x.new_zeros(len(q), len(x), q.shape[1])
        asked = project(q, x[piece.rows])  # no other rows are looked at
        query[:, piece.rows] = self.turn_q.to(x.dtype).at(piece.rows)(asked)
        new = self._weights_of(query, key, place, piece.rows)
        both = ((piece.weights + new) / 2).masked_fill(piece.weights == 0, 0.0)
        return replace(piece, weights=both)

    def _values(self, v, o, moments: Moments, record: dict):
        new, lost, energy, second = [], 0.0, 0.0, moments.second.cpu()
        o = o.clone()
        for group in self.groups:
            readers = torch.stack([sum(o[:, j].T @ o[:, j] for j in queries) for queries in group.values()])
            found = merge_values(v[list(group)], second, readers)
            for spread, queries in zip(found.maps, group.values(), strict=True):
                o[:, queries] = o[:, queries] @ spread
            new.append(found.head)
            lost, energy = lost + found.lost, energy + found.energy
        record["values_lost"] = share(lost, energy)
        return torch.stack(new), o

    def _with_values(self, new: AttentionLayer, v, seen: list[torch.Tensor], record: dict) -> AttentionLayer:
        """The layer with its values refitted to what the base's attention wrote.

        Args:
            v: the old ones [G', d, n], float64.
            seen: the layer's attention weights of the rows of the pieces.
        """
        pieces = []
        for place, (piece, weights) in enumerate(zip(self.seen.pieces, seen, strict=True)):
            wanted, rms = self.seen.base[place].output[piece.rows], self.seen.rms[place][piece.rows]
            pieces.append(ValuePiece(piece.x, piece.rows, weights, wanted, _weights(rms)))
        fit, held = (ValueProblem(part, new.o, self.target.kv_heads) for part in train_and_validation(pieces))
        found = solve(fit, held, v, steps=self.settings.steps, damping=self.settings.damping)
        record["values_fit"] = [round(found.before, 6), round(found.after, 6)]
        return new.replace(**stacked(new, "v", list(found.weight)))

    def _with_output(self, new: AttentionLayer, o, record: dict, seen: list | None = None) -> AttentionLayer:
        """The layer with its output projection refitted to what the base's attention wrote; the first token left out.

        Args:
            o: the old one [D, H, d], float64.
            seen: the layer's attention weights of the rows of the pieces, which are then fitted; else all rows are.
                Texts held back are then not fitted either: they are to judge the values.
        """
        sums = [Regression(exact=False), Regression(exact=False)]
        if seen is None:
            list(self._each(partial(self.heads, new)))  # kept
        for place, call in enumerate(self.seen.base):
            rms = _weights(self.seen.rms[place])
            if seen is None:
                rows, z = slice(1, None), self.heads(new, place)[1:]
            else:
                rows, z = self.seen.pieces[place].rows, self._mixed(new, place, seen[place])
            sums[is_validation(place, len(self.seen.base))].add(z.flatten(1), call.output[rows], rms[rows])
        pairs, ridges = (sums[0].pair, sums[1].pair), list(self.settings.ridges)
        found = fit_output(o.flatten(1).to(pairs[0][0]), *pairs, ridges, with_held=seen is None)
        record["ridge"], whole = found.ridge, sums[1].energy
        lost = [share(whole + error, whole) for error in (found.before, found.after)]
        record["output_lost"] = record.get("output_lost", []) + lost
        return new.replace(o=found.weight.unflatten(1, o.shape[1:]).cpu().to(new.o.dtype))

    def _key_heads(self, record: dict) -> dict[str, torch.Tensor]:
        """Of each group the key head with which all its queries' scores come nearest to the base's.

        Behind a norm a key head can be kept, and not mixed: the norm has a scale for each channel and none for a head.
        """
        layer, total = self.layer, {}
        for piece, call in zip(self.seen.pieces, self.seen.calls, strict=True):
            wanted, scale = piece.scores(), scale_of(call)
            for group in self.groups:
                readers = [query for queries in group.values() for query in queries]
                weights = piece.weights[readers]
                for head in group:
                    errors = call.query[readers][:, piece.rows] @ call.key[head].T * scale - wanted[readers]
                    weighted = weights * errors
                    lost = (weighted * errors).double().sum() - weighted.sum(-1).double().square().sum()
                    total[readers[0], head] = total.get((readers[0], head), 0.0) + float(lost)
        self.key_heads = []
        for group in self.groups:
            first = next(iter(group.values()))[0]
            self.key_heads.append(min(group, key=lambda head: total[first, head]))
        record["key_heads"] = self.key_heads
        names = ("k", "k_bias", "k_norm")
        return {n: tensor[self.key_heads] for n, tensor in layer.tensors().items() if n in names}


def _weights(rms: torch.Tensor) -> torch.Tensor:
    """ω of rows: errors count relative to the hidden states that they are added to."""
    return 1 / rms.double().square().clamp(min=1e-30)

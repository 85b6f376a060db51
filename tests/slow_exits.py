"""Per-token exits written for clarity: one token after the other, plain softmax, K and V in lists. The oracle.

Under `propagate` a token that leaves computes K and V of the layers above from the hidden state that it left with.
Under `recompute` whoever reads K and V finds what full depth gives, so every step may simply run the whole text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from helios_sim.live.memory.kv import Packed
from helios_sim.live.model.decoder import Rotary, SegmentedModel
from helios_sim.live.model.heads import ExitHeads


@dataclass
class Written:
    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)


class OneText:
    """Attention of one text that grows by a token at a time."""

    def __init__(self, model: SegmentedModel) -> None:
        self.a = model.architecture
        self.keys: list[list[Tensor]] = [[] for _ in range(self.a.n_layers)]
        self.values: list[list[Tensor]] = [[] for _ in range(self.a.n_layers)]
        self._rotary = Rotary(self.a, model.dtype, "cpu")

    def at(self, position: int) -> OneText:
        self.position = position
        self.rotations = self._rotary.at(torch.tensor([position]))
        return self

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        assert len(self.keys[layer]) == self.position  # every position once, in order
        self.keys[layer].append(k[0])
        self.values[layer].append(v[0])

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.write(layer, k, v)
        first = max(0, self.position + 1 - self.a.window_tokens) if self.a.slides(layer) else 0
        keys, values = torch.stack(self.keys[layer][first:]), torch.stack(self.values[layer][first:])
        heads = []
        for head in range(self.a.n_heads):
            of_kv = head // (self.a.n_heads // self.a.n_kv_heads)
            scores = keys[:, of_kv] @ q[0, head] * self.a.attention_scale
            heads.append(scores.softmax(0) @ values[:, of_kv])
        return torch.cat(heads)[None]


class SlowModel:
    def __init__(self, model: SegmentedModel, heads: ExitHeads, measure: str, threshold: float) -> None:
        self.model, self.heads, self.measure, self.threshold = model, heads, measure, threshold
        self.depths = (*heads.exits, model.n_loaded)
        self.checks = self.depths[:-1]  # where tokens are checked

    def says(self, exit_index: int, hidden: Tensor) -> tuple[int, float]:
        """Token and confidence at an exit, for one hidden state (1, d)."""
        logits = self.model.logits(self.heads.adapt(exit_index, hidden))[0] / self.heads.temperature[exit_index]
        top = logits.softmax(0).sort(descending=True)
        if self.measure == "classifier":
            return int(top.indices[0]), float(self.heads.classify(exit_index, hidden))
        sure = top.values[0] - (top.values[1] if self.measure == "margin" else 0.0)
        if self.measure == "entropy":
            sure = 1 - torch.distributions.Categorical(logits=logits).entropy() / math.log(len(logits))
        return int(top.indices[0]), float(sure)

    def leaves(self, states: list[Tensor]) -> int:
        """The first confident exit, or the last."""
        for index, state in enumerate(states[:-1]):
            if self.depths[index] in self.checks and self.says(index, state)[1] >= self.threshold:
                return index
        return len(states) - 1

    def states(self, text: OneText, token: int, position: int) -> list[Tensor]:
        """At every exit; K and V of all layers are written on the way."""
        hidden, start, found = self.model.embed(torch.tensor([token]), torch.tensor([position])), 0, []
        for depth in self.depths:
            hidden, start = self.model.run(hidden, start, depth, text.at(position)), depth
            found.append(hidden)
        return found

    def forget_above(self, text: OneText, depth: int) -> None:
        for layer in range(depth, self.model.n_loaded):
            text.keys[layer].pop()
            text.values[layer].pop()

    @torch.no_grad()
    def lockstep(self, prompts: list[list[int]], tokens: int, lazy: bool = False) -> list[Written]:
        """KvRule.PROPAGATE for texts that decode side by side; lazily, all leave at the deepest exit of them all."""
        texts, written = [OneText(self.model) for _ in prompts], [Written() for _ in prompts]
        for text, prompt, answer in zip(texts, prompts, written, strict=True):
            for position, token in enumerate(prompt):
                last = self.states(text, token, position)
            answer.tokens.append(self.says(len(self.depths) - 1, last[-1])[0])
            answer.depths.append(self.depths[-1])
        for step in range(tokens - 1):
            positions = [len(prompt) + step for prompt in prompts]
            found = [
                self.states(text, answer.tokens[-1], position)
                for text, answer, position in zip(texts, written, positions, strict=True)
            ]
            exits = [self.leaves(states) for states in found]
            if lazy:
                exits = [max(exits)] * len(exits)
            for text, states, index, position, answer in zip(texts, found, exits, positions, written, strict=True):
                self.forget_above(text, self.depths[index])
                self.model.propagate(states[index], self.depths[index], self.model.n_loaded, text.at(position))
                answer.tokens.append(self.says(index, states[index])[0])
                answer.depths.append(self.depths[index])
        return written

    @torch.no_grad()
    def whole_text(self, ids: list[int]) -> list[Tensor]:
        """The last token's state at every exit, the whole text run through all layers."""
        step = Packed(self.model.architecture, 1, len(ids))
        hidden, start, states = self.model.embed(torch.tensor(ids), step.positions), 0, []
        for depth in self.depths:
            hidden, start = self.model.run(hidden, start, depth, step), depth
            states.append(hidden[-1:])
        return states

    @torch.no_grad()
    def whole_texts(self, prompt: list[int], tokens: int) -> Written:
        """KvRule.RECOMPUTE: the whole text at full depth for every token, of which only its own exit is used."""
        answer = Written()
        while len(answer.tokens) < tokens:
            states = self.whole_text([*prompt, *answer.tokens])
            index = self.leaves(states) if answer.tokens else len(states) - 1  # a prompt runs all layers
            answer.tokens.append(self.says(index, states[index])[0])
            answer.depths.append(self.depths[index])
        return answer

    @torch.no_grad()
    def given(self, prompt: list[int], tokens: list[int]) -> list[tuple[int, dict[int, int]]]:
        """For each token of a given answer: where it would leave, and what each exit would choose."""
        found = []
        for n in range(len(tokens)):
            states = self.whole_text([*prompt, *tokens[:n]])
            choices = {
                depth: self.says(i, state)[0] for i, (depth, state) in enumerate(zip(self.depths, states, strict=True))
            }
            found.append((self.depths[self.leaves(states)], choices))
        return found

    @torch.no_grad()
    def forced(self, prompt: list[int], depths: list[int], copies: bool) -> tuple[list[int], list[list[float]]]:
        """Tokens of one text whose tokens leave at these depths, and of each the confidence at every exit.

        K and V that a token left out are those of the exit's own layer (`copies`), or computed from its state there.
        """
        text, tokens, sure = OneText(self.model), [], []
        for position, token in enumerate(prompt):
            states = self.states(text, token, position)
        for n, depth in enumerate(depths):
            if n:
                position = len(prompt) + n - 1
                states = self.states(text, tokens[-1], position)
                self.forget_above(text, depth)
                if copies:
                    for layer in range(depth, self.model.n_loaded):
                        text.keys[layer].append(text.keys[depth - 1][-1])
                        text.values[layer].append(text.values[depth - 1][-1])
                else:
                    left = states[self.depths.index(depth)]
                    self.model.propagate(left, depth, self.model.n_loaded, text.at(position))
            says = [self.says(i, state) for i, state in enumerate(states)]
            tokens.append(says[self.depths.index(depth)][0])
            sure.append([value for _, value in says])
        return tokens, sure

    @torch.no_grad()
    def released(self, prompt: list[int], thresholds: list[dict[int, float]]) -> tuple[Written, list[int]]:
        """Tokens that ramps deliver, or the whole model where none is sure, with K and V of all layers; and what the
        whole model says in place of each. `thresholds` of each token, by ramp; `depths` are those of delivery.
        """
        text, answer, verdicts = OneText(self.model), Written(), []
        for position, token in enumerate(prompt):
            states = self.states(text, token, position)
        for n, ramps in enumerate(thresholds):
            if n:
                states = self.states(text, answer.tokens[-1], len(prompt) + n - 1)
            says = [self.says(i, state) for i, state in enumerate(states)]
            sure = [i for i, depth in enumerate(self.depths) if depth in ramps and says[i][1] >= ramps[depth]]
            at = sure[0] if sure else len(says) - 1
            answer.tokens.append(says[at][0])
            answer.depths.append(self.depths[at])
            verdicts.append(says[-1][0])
        return answer, verdicts

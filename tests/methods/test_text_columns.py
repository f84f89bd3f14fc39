"""Columns of encoders unlike CLIP's: prompts of several lengths, templates, two encoders behind one another."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from forget_concept.core.methods.text_columns import collect_columns
from forget_concept.core.methods.uce import UCESettings, solve_context_map
from forget_concept.core.models.text_encoders import TextEncoder, encode_prompts
from forget_concept.core.models.text_states import TextStates
from forget_concept.core.models.token_positions import phrase_span
from forget_concept.core.request.concept import Concept
from forget_concept.core.request.request import ForgetRequest

WIDTH = 640


def _vector(*what: object) -> Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(zlib.crc32(repr(what).encode())))


class Worded:
    """One token a word, in a template, without padding; a state is drawn from all words up to its own, or from all."""

    max_length = 1000

    def __init__(
        self, before: Sequence[str] = (), behind: Sequence[str] = (), cut: int = 0, causal: bool = True
    ) -> None:
        self.before, self.behind, self.cut, self.causal = list(before), list(behind), cut, causal
        self.words_from = len(before) - cut

    def _words(self, prompt: str) -> list[str]:
        return [*self.before, *prompt.split(), *self.behind]

    def token_ids(self, prompt: str) -> list[int]:
        return [zlib.crc32(word.encode()) for word in self._words(prompt)][self.cut :]

    def phrase_ids(self, phrase: str) -> list[int]:
        return [zlib.crc32(word.encode()) for word in phrase.split()]

    def row(self, prompt: str) -> Tensor:
        words = self._words(prompt)
        known = [words[: i + 1] if self.causal else (i, words) for i in range(len(words))]
        return torch.stack([_vector(self.causal, one) for one in known[self.cut :]])

    def encode(self, prompts: Sequence[str]) -> TextStates:
        return TextStates.cat([TextStates(self.row(prompt)[None]) for prompt in prompts])


class Two:
    """The states of two encoders behind one another, as Stable Diffusion 3 reads CLIP's and T5's."""

    def __init__(self) -> None:
        first, second = Worded(["<s>"], ["</s>"]), Worded([], ["</s>"], causal=False)
        self.parts = (first, second)
        self.max_length = second.max_length
        self.token_ids, self.phrase_ids = second.token_ids, second.phrase_ids

    @property
    def segments(self) -> tuple[tuple[int, TextEncoder], ...]:
        return ((0, self.parts[0]), (LONG, self.parts[1]))

    def encode(self, prompts: Sequence[str]) -> TextStates:
        rows = []
        for prompt in prompts:
            first, second = (part.row(prompt) for part in self.parts)
            first = torch.cat([first, torch.zeros(LONG - len(first), WIDTH)])
            rows.append(TextStates(torch.cat([first, second])[None]))
        return TextStates.cat(rows)


LONG = 24
ENCODERS = {
    "template": lambda: Worded(["<user>", "say:"], ["</user>", "<answer>"]),
    "template cut off": lambda: Worded(["<system>", "<user>"], ["</user>"], cut=2),
    "unpadded, not causal": lambda: Worded([], ["</s>"], causal=False),
    "two encoders": Two,
}
SETTINGS = UCESettings(ridge=1e-4, templates=("a photo of a {}", "a {} on a hill", "{}"), tolerance=0)


@pytest.mark.parametrize("name", list(ENCODERS))
@pytest.mark.parametrize("replacement", ["old castle", "hut", ""])
def test_the_solved_map_takes_each_prompt_to_its_guide_and_keeps_the_rest(name: str, replacement: str) -> None:
    encoder = ENCODERS[name]()
    request = ForgetRequest(concepts=(Concept("church", replacement=replacement or None),), preserve=("tower",))
    columns = collect_columns(encoder, request, SETTINGS)["tokens"]
    assert not bool((columns.preserved == 0).all(0).any()) or name == "two encoders", "padding is no text state"
    mapped = solve_context_map(columns, SETTINGS).delta()
    states = encode_prompts(encoder, ["a photo of a church", "a photo of a tower", ""])
    for prompt in ("a photo of a tower", ""):
        known = encoder.encode([prompt]).hidden[0]
        assert float((known @ mapped.T).norm() / known.norm()) < 0.02
    # the last word, and everything that knows of it, is what it is in the guide prompt
    guide = encoder.encode([f"a photo of a {replacement}".strip()]).hidden[0]
    own = states.hidden[0, : states.known()[0]]
    after = own + own @ mapped.T
    assert float((after[-1] - guide[-1]).norm() / guide[-1].norm()) < 0.02


def test_prompts_of_several_lengths_are_padded_with_zeros_that_count_for_nothing() -> None:
    encoder = Worded([], ["</s>"])
    short, long = "a church", "a church on a green hill"
    both = encode_prompts(encoder, [short, long])
    assert both.known() == [3, 7]
    assert bool((both.hidden[0, 3:] == 0).all())
    torch.testing.assert_close(both.mean()[0], encoder.row(short).mean(0))
    again = both.index([1, 0]).to(dtype=torch.float64, copy=True)
    assert again.known() == [7, 3]
    assert TextStates.cat([both, encode_prompts(encoder, ["church"])]).known() == [3, 7, 2]


def test_a_tokenizer_whose_spaces_are_tokens_finds_the_phrase() -> None:
    class Spaced(Worded):
        """As language models': a space belongs to the word behind it, and at the end it is a token."""

        def phrase_ids(self, phrase: str) -> list[int]:
            ids = super().phrase_ids(phrase)
            return [*ids, 0] if phrase.endswith(" ") else ids

    assert phrase_span(Spaced(["<user>"], ["</user>"]), "red church", "a red church on a hill") == (2, 2)


def test_no_text_is_tokenized_twice() -> None:
    """With many concepts the tokenizer would take most of the time."""

    class Counting(Worded):
        asked: list[str]

        def token_ids(self, prompt: str) -> list[int]:
            self.asked.append(f"prompt {prompt}")
            return super().token_ids(prompt)

        def phrase_ids(self, phrase: str) -> list[int]:
            self.asked.append(f"phrase {phrase}")
            return super().phrase_ids(phrase)

    encoder = Counting(["<s>"], ["</s>"])
    encoder.asked = []
    request = ForgetRequest(tuple(Concept(f"thing{n}", replacement="circle") for n in range(5)), preserve=("moon",))
    columns = collect_columns(encoder, request, UCESettings())
    assert len(set(encoder.asked)) == len(encoder.asked) > 50
    # and what comes out does not change
    plain = collect_columns(Worded(["<s>"], ["</s>"]), request, UCESettings())
    assert all(
        torch.equal(getattr(columns["tokens"], part), getattr(plain["tokens"], part)) for part in ("target", "guide")
    )

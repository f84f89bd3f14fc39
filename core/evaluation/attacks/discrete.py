"""White-box attack over the vocabulary: real words before the concept's prompt, found along the gradient.

Greedy coordinate gradient search (Zou et al., arXiv 2307.15043) on UnlearnDiffAtk's loss (arXiv 2310.11868), which is
the denoising loss of pictures of the concept: the gradient with respect to the one-hot of each place of the prefix
ranks the vocabulary, some of the best are tried, and the best of these is taken where it lowers the loss. What comes
out is text that anyone can type: it is held to read as the very tokens that were searched for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from ...errors import ForgetConceptError
from ...files.workspace import key_of
from ...models.latent_diffusion import LatentDiffusion
from ...models.text_encoders import CLIPText
from ...models.token_positions import end_position
from ...progress import Progress, ProgressEvent, report_progress
from ...training.frozen import frozen
from ...training.textual_inversion import PLACEHOLDER, InvertedText
from .context import AttackContext, SearchResult
from .denoising import NoisedRows, denoising_losses, noised_rows

__all__ = ["Prefixes", "discrete"]

# pictures through the UNet at a time while candidates are compared
CHUNK = 64


class Prefixes:
    """Prefixes of whole words of a text encoder's vocabulary, put before some prompts.

    ``words`` maps an id to how it is written, for every token that is a word of its own and can be shown.
    """

    def __init__(self, encoder: CLIPText, prompts: Sequence[str]) -> None:
        """Raises :class:`ForgetConceptError` where the vocabulary has no whole words."""
        self.encoder, self.prompts = encoder, list(prompts)
        tokenizer = encoder.tokenizer
        special = set(tokenizer.all_special_ids)
        self.words: dict[int, str] = {}
        for token, index in tokenizer.get_vocab().items():
            # a piece that ends no word would grow together with what comes after it
            if index not in special and token.endswith("</w>"):
                word = tokenizer.decode([index]).strip()
                # U+FFFD: a byte that is no character by itself
                if word and word.isprintable() and "\ufffd" not in word and len(word.split()) == 1:
                    self.words[index] = word
        self.words = dict(sorted(self.words.items()))
        if not self.words:
            raise ForgetConceptError("This text encoder's vocabulary has no whole words to attack with.")
        self._prompt_ids = [list(encoder.phrase_ids(prompt)) for prompt in self.prompts]

    def text(self, ids: Sequence[int]) -> str:
        """The prefix as a person types it."""
        return " ".join(self.words[i] for i in ids)

    def prefixed(self, ids: Sequence[int]) -> list[str]:
        """Each prompt with the prefix before it."""
        return [f"{self.text(ids)} {prompt}" for prompt in self.prompts]

    def reads_back(self, ids: Sequence[int]) -> bool:
        """Whether the tokenizer reads the prompts' text as exactly these ids and the prompts' own."""
        return all(
            list(self.encoder.phrase_ids(text)) == [*ids, *meant]
            for text, meant in zip(self.prefixed(ids), self._prompt_ids, strict=True)
        )


def discrete(context: AttackContext, progress: Progress | None = None) -> SearchResult:
    """Words before the target's prompts. Raises :class:`ModelError` for an encoder without gradients and
    :class:`TokenError` for prompts that are cut off."""
    encoder, budget = context.clip, context.budget
    prefixes = Prefixes(encoder, context.target.prompts)
    key = key_of(
        *("discrete", context.model.model_hash, context.text_key, context.latents, list(context.target.prompts)),
        *(asdict(budget), context.seed),
    )
    known = None if context.workspace is None else context.workspace.load("attack", key)
    if known is None:
        generator = torch.Generator("cpu").manual_seed(context.seed)
        with context.edited(), frozen(context.model.unet, encoder.model):
            rows = noised_rows(context.model, context.latents, budget.rows, generator)
            search = _Search(context.model, encoder, prefixes, rows, generator)
            search.run(budget.tokens, budget.rounds, budget.candidates, budget.likely, progress)
        known = {
            "ids": torch.tensor(search.ids),
            "losses": torch.tensor(search.losses, dtype=torch.float64),
            "spent": torch.tensor([search.gradient_steps, search.passes]),
        }
        if context.workspace is not None:
            context.workspace.save("attack", key, known)
    steps, passes = known["spent"].tolist()
    said = prefixes.prefixed(known["ids"].tolist())
    return SearchResult(tuple(said), context.model, steps, passes, tuple(known["losses"].tolist()))


class _Search:
    """The search itself; ``ids`` is the best prefix so far, ``losses`` those of every prefix that was taken."""

    def __init__(
        self,
        model: LatentDiffusion,
        encoder: CLIPText,
        prefixes: Prefixes,
        rows: NoisedRows,
        generator: torch.Generator,
    ) -> None:
        self.model, self.encoder, self.prefixes, self.rows, self.generator = model, encoder, prefixes, rows, generator
        self.allowed = torch.tensor(list(prefixes.words))
        self.prompt_of_row = [i % len(prefixes.prompts) for i in range(len(rows))]  # which prompt a row is asked under
        self.table: Tensor = encoder.model.get_input_embeddings().weight.detach()
        self.ids: list[int] = []
        self.losses: list[float] = []
        self.gradient_steps = self.passes = 0

    def run(self, tokens: int, rounds: int, candidates: int, likely: int, progress: Progress | None) -> None:
        self.ids = self._start(tokens)
        for prompt in self.prefixes.prefixed(self.ids):
            end_position(self.encoder, prompt)  # raises where it is cut off
        (loss,) = self.losses_of([self.ids])
        self.losses.append(loss)
        tried = {tuple(self.ids)}
        ranked = None
        for turn in range(1, rounds + 1):
            ranked = self._ranked(likely) if ranked is None else ranked
            some = self._candidates(ranked, candidates, tried)
            if some:
                losses = self.losses_of(some)
                best = min(range(len(some)), key=losses.__getitem__)
                if losses[best] < self.losses[-1]:
                    self.ids, ranked = some[best], None
                    self.losses.append(losses[best])
            report_progress(progress, ProgressEvent(turn, rounds, self.losses[-1], message="searching for words"))

    def _start(self, tokens: int) -> list[int]:
        for _ in range(100):
            chosen = torch.randint(len(self.allowed), (tokens,), generator=self.generator)
            ids = self.allowed[chosen].tolist()
            if self.prefixes.reads_back(ids):
                return ids
        raise ForgetConceptError("No words of this vocabulary can be put before the prompt and read back as they are.")

    def changes(self) -> Tensor:
        """The loss' gradient with respect to the one-hot of each place: ``(tokens, words)``, as in ``allowed``."""
        vectors = self.table[self.ids].float().requires_grad_()
        text = InvertedText(self.encoder, {PLACEHOLDER: vectors})
        states = text.states([f"{PLACEHOLDER} {prompt}" for prompt in self.prefixes.prompts])
        loss = denoising_losses(self.model, self.rows, states.index(self.prompt_of_row)).mean()
        (gradient,) = torch.autograd.grad(loss, vectors)
        self.gradient_steps += 1
        self.passes += len(self.rows)
        return gradient @ self.table[self.allowed.to(self.table.device)].float().T

    def _ranked(self, likely: int) -> list[tuple[int, int]]:
        """Places and tokens that lower the loss most, to first order."""
        best = self.changes().topk(min(likely, len(self.allowed)), dim=1, largest=False).indices.cpu()
        return [(place, int(self.allowed[i])) for place, row in enumerate(best) for i in row]

    def _candidates(self, ranked: list[tuple[int, int]], count: int, tried: set[tuple[int, ...]]) -> list[list[int]]:
        found: list[list[int]] = []
        for i in torch.randperm(len(ranked), generator=self.generator).tolist():
            place, token = ranked[i]
            ids = [*self.ids[:place], token, *self.ids[place + 1 :]]
            if len(found) < count and tuple(ids) not in tried and self.prefixes.reads_back(ids):
                tried.add(tuple(ids))
                found.append(ids)
        return found

    @torch.no_grad()
    def losses_of(self, several: Sequence[Sequence[int]]) -> list[float]:
        """The mean loss over the rows under each of several prefixes."""
        n, each = len(self.rows), len(self.prefixes.prompts)
        at_once = max(CHUNK // n, 1)
        means: list[float] = []
        for start in range(0, len(several), at_once):
            part = several[start : start + at_once]
            states = self.encoder.encode([text for ids in part for text in self.prefixes.prefixed(ids)])
            rows = [each * i + j for i in range(len(part)) for j in self.prompt_of_row]
            many = NoisedRows(
                self.rows.x.repeat(len(part), 1, 1, 1),
                self.rows.times.repeat(len(part)),
                self.rows.noise.repeat(len(part), 1, 1, 1),
            )
            losses = denoising_losses(self.model, many, states.index(rows))
            self.passes += len(many)
            means += losses.view(len(part), n).double().mean(1).tolist()
        return means

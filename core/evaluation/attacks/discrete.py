"""White-box attack over the vocabulary: a prefix of real words, found by greedy coordinate gradient search.

The search minimizes UnlearnDiffAtk's loss (arXiv 2310.11868), the denoising loss of images of the concept. The gradient
with respect to the one-hot vector of each prefix position ranks the vocabulary, some of the best tokens are tried, and
the best of these is accepted if it lowers the loss. The result is plain text that tokenizes to exactly the tokens
found.

Reference: Zou et al., arXiv 2307.15043.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from ...errors import ForgetConceptError
from ...files.workspace import Workspace, key_of
from ...models.latent_diffusion import LatentDiffusion
from ...models.text_encoders import CLIPText
from ...models.token_positions import end_position
from ...progress import Progress, ProgressEvent, report_progress
from ...training.frozen import frozen
from ...training.textual_inversion import PLACEHOLDER, InvertedText
from .context import AttackContext, SearchResult
from .denoising import NoisedRows, denoising_losses, noised_rows

__all__ = ["Prefixes", "discrete"]

# images per UNet pass while candidates are compared
CHUNK = 64


class Prefixes:
    """Prefixes of whole words from a text encoder's vocabulary.

    ``words`` maps token ids to text, for every token that is a whole, printable word.

    Args:
        encoder: The text encoder.
        prompts: Prompts that the prefixes are prepended to.

    Raises:
        ForgetConceptError: If the vocabulary has no whole words.
    """

    def __init__(self, encoder: CLIPText, prompts: Sequence[str]) -> None:
        self.encoder, self.prompts = encoder, list(prompts)
        tokenizer = encoder.tokenizer
        special = set(tokenizer.all_special_ids)
        self.words: dict[int, str] = {}
        for token, index in tokenizer.get_vocab().items():
            # a token without "</w>" would merge with the next one
            if index not in special and token.endswith("</w>"):
                word = tokenizer.decode([index]).strip()
                # U+FFFD marks a byte that is not a complete character
                if word and word.isprintable() and "\ufffd" not in word and len(word.split()) == 1:
                    self.words[index] = word
        self.words = dict(sorted(self.words.items()))
        if not self.words:
            raise ForgetConceptError(
                "This text encoder's vocabulary has no whole words to attack with: leave the discrete attack out."
            )
        self._prompt_ids = [list(encoder.phrase_ids(prompt)) for prompt in self.prompts]

    def text(self, ids: Sequence[int]) -> str:
        """Return the prefix as text."""
        return " ".join(self.words[i] for i in ids)

    def prefixed(self, ids: Sequence[int]) -> list[str]:
        """Return each prompt with the prefix prepended."""
        return [f"{self.text(ids)} {prompt}" for prompt in self.prompts]

    def reads_back(self, ids: Sequence[int]) -> bool:
        """Return whether the prefixed prompts tokenize to exactly ``ids`` followed by the prompts' own ids."""
        return all(
            list(self.encoder.phrase_ids(text)) == [*ids, *prompt_ids]
            for text, prompt_ids in zip(self.prefixed(ids), self._prompt_ids, strict=True)
        )


def discrete(context: AttackContext, progress: Progress | None = None) -> SearchResult:
    """Search for words to prepend to the target's prompts.

    Raises:
        ModelError: If the text encoder does not support gradients.
        TokenError: If a prompt is truncated.
    """
    encoder, budget = context.clip, context.budget
    prefixes = Prefixes(encoder, context.target.prompts)
    key = key_of(
        *("discrete", context.model.model_hash, context.text_key, context.latents, list(context.target.prompts)),
        *(asdict(budget), context.seed),
    )
    known = None if context.workspace is None else _found(context.workspace, key, prefixes)
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
    prompts = prefixes.prefixed(known["ids"].tolist())
    return SearchResult(tuple(prompts), context.model, steps, passes, tuple(known["losses"].tolist()))


def _found(workspace: Workspace, key: str, prefixes: Prefixes) -> dict[str, Tensor] | None:
    """The result of an earlier search; one of other words than the vocabulary's is deleted, with a warning."""
    found = workspace.load("attack", key, {"ids": (None,), "losses": (None,), "spent": (2,)})
    if found is None:
        return None
    if any(type(index) is not int or index not in prefixes.words for index in found["ids"].tolist()):
        workspace.discard("attack", key, "its words are not in the text encoder's vocabulary")
        return None
    counts = found["spent"].tolist()
    if not found["losses"].is_floating_point() or any(type(count) is not int or count < 0 for count in counts):
        workspace.discard("attack", key, "it has losses or counts that cannot be")
        return None
    return found


class _Search:
    """The search; ``ids`` is the best prefix so far, ``losses`` are those of the accepted prefixes."""

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
        self.prompt_of_row = [i % len(prefixes.prompts) for i in range(len(rows))]  # prompt index of each row
        self.table: Tensor = encoder.model.get_input_embeddings().weight.detach()
        self.ids: list[int] = []
        self.losses: list[float] = []
        self.gradient_steps = self.passes = 0

    def run(self, tokens: int, rounds: int, candidates: int, likely: int, progress: Progress | None) -> None:
        self.ids = self._start(tokens)
        for prompt in self.prefixes.prefixed(self.ids):
            end_position(self.encoder, prompt)  # raises TokenError if it is truncated
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
        raise ForgetConceptError(
            "No words of this vocabulary tokenize to themselves before the prompt: leave the discrete attack out."
        )

    def changes(self) -> Tensor:
        """Gradient of the loss with respect to the one-hot vector of each position, ``(tokens, words)``."""
        vectors = self.table[self.ids].float().requires_grad_()
        text = InvertedText(self.encoder, {PLACEHOLDER: vectors})
        states = text.states([f"{PLACEHOLDER} {prompt}" for prompt in self.prefixes.prompts])
        loss = denoising_losses(self.model, self.rows, states.index(self.prompt_of_row)).mean()
        (gradient,) = torch.autograd.grad(loss, vectors)
        self.gradient_steps += 1
        self.passes += len(self.rows)
        return gradient @ self.table[self.allowed.to(self.table.device)].float().T

    def _ranked(self, likely: int) -> list[tuple[int, int]]:
        """Positions and tokens that lower the loss most, to first order."""
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
        """Mean loss over the rows for each prefix."""
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

"""The job that evaluates a patch on the loaded model, and the reports of such jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ForgetConceptError, RequestError
from ..files.names import fresh_file, is_unicode, patch_name
from ..files.workspace import Workspace
from ..files.writing import check_folder, check_writable, make_folder
from ..mini.recognition import embedded_name
from ..progress import Progress
from ..request.request import MAX_SEED
from .errors import NotFoundError
from .forget_job import check_strength, sampling_of
from .host_interface import Host
from .jobs import Outcome
from .patch_library import PLACEHOLDER, PatchLibrary

if TYPE_CHECKING:
    from ..evaluation.report import Report

# the evaluation is imported where it is used, so that the host starts without waiting for it

__all__ = ["ATTACKS", "BENCHMARKS", "EvaluateJob", "Reports"]

ATTACKS = ("none", "quick", "standard")
BENCHMARKS = ("automatic", "world", "embedded", "checkpoints")
FEWEST, MOST = 4, 1000


class Reports:
    """Evaluation reports in the host's data folder; a report's name is the stem of its files."""

    def __init__(self, host: Host) -> None:
        self._host = host

    @property
    def folder(self) -> Path:
        return self._host.data_folder() / "reports"

    def names(self) -> list[str]:
        """The names of all reports, the newest first. Raises where the folder cannot be read."""
        if not self.folder.is_dir():
            return []
        try:
            found = [(file.stat().st_mtime, file.stem) for file in self.folder.glob("*.html") if is_unicode(file.stem)]
        except OSError as error:
            raise ForgetConceptError(f"The reports cannot be read: {error.strerror or error}.") from error
        return [stem for _, stem in sorted(found, reverse=True)]

    def find(self, name: str, end: str = ".html") -> Path:
        """A report's page (``.html``) or figures (``.json``); a name is looked up and never made into a path."""
        if name not in self.names() or not (file := self.folder / f"{name}{end}").is_file():
            raise NotFoundError(f"There is no report '{name[:120]}'.")
        return file


@dataclass(frozen=True)
class EvaluateJob:
    """A request to evaluate a patch on the loaded model; see :class:`EvaluationSettings` for what is not listed here.

    Attributes:
        patch: The patch's name in the library.
        strength: The strength to evaluate it at.
        concepts: What to evaluate; empty: the concepts that the patch names.
        clip_judge: A CLIP model that labels the pictures of a checkpoint. The embedded model has its own judge.
    """

    patch: str
    strength: float = 1.0
    concepts: tuple[str, ...] = ()
    count: int = 16
    seed: int = 0
    steps: int = 16
    baselines: bool = False
    attacks: str = "none"
    m_score: bool = False
    full: bool = False
    benchmark: str = BENCHMARKS[0]
    clip_judge: str = ""

    @property
    def title(self) -> str:
        return f"evaluating '{self.patch}'"

    def check(self, host: Host, library: PatchLibrary, reports: Reports) -> None:
        """Raise :class:`ForgetConceptError` for what can be refused before the job starts."""
        entry = library.find(self.patch)
        if not self.concepts and not entry.concepts:
            raise RequestError("The patch does not say what it forgets: write the concept.")
        check_strength(self.strength)
        if not FEWEST <= self.count <= MOST:
            raise RequestError(f"The number of pictures must be {FEWEST} to {MOST}, not {self.count}.")
        if not 1 <= self.steps <= MOST:
            raise RequestError(f"The sampling steps must be 1 to {MOST}, not {self.steps}.")
        if not 0 <= self.seed <= MAX_SEED:
            raise RequestError(f"The seed must be 0 to {MAX_SEED}, not {self.seed}.")
        if self.attacks not in ATTACKS:
            raise RequestError(f"The attacks '{self.attacks}' are not known: choose one of {', '.join(ATTACKS)}.")
        if self.benchmark not in BENCHMARKS:
            known = ", ".join(BENCHMARKS)
            raise RequestError(f"The benchmark '{self.benchmark}' is not known: choose one of {known}.")
        (stem,) = patch_name(PLACEHOLDER, list(self.concepts) or entry.concepts)
        check_folder(reports.folder, f"{stem}_00000.html")
        host.model()

    def work(self, host: Host, library: PatchLibrary, progress: Progress) -> Report:
        """Draw with and without the patch, and judge the pictures."""
        from ..evaluation import BASELINES, UNEDITED
        from ..evaluation.assess import EvaluationSettings, assess
        from ..evaluation.stress import FULL
        from .evaluation_text import chosen_benchmark, evaluators, known_only

        entry = library.find(self.patch)
        patch = library.load(self.patch)
        names = list(self.concepts) or entry.concepts
        with host.latent_diffusion() as model:
            patch.check_fits(model.survey)
            embedded = embedded_name(model.survey, model.model_hash) is not None
            bench = chosen_benchmark(self.benchmark, embedded, names)
            judges = evaluators(embedded, self.clip_judge, bench)
            settings = EvaluationSettings(
                self.count,
                self.seed,
                BASELINES if self.baselines else (UNEDITED,),
                sampling_of(model, self.steps),
                m_score=self.m_score,
                attacks=None if self.attacks == "none" else self.attacks,
                stress=FULL if self.full else None,
            )
            return assess(
                model,
                judges,
                [(patch, self.strength)],
                names,
                settings,
                bench=bench,
                # other concepts of the same patch are not part of the retain set
                without=known_only(entry.concepts, bench),
                files=[entry.path.name],
                progress=progress,
                workspace=Workspace(make_folder(host.data_folder()) / "work"),
            )

    def finish(self, reports: Reports, report: Report) -> Outcome:
        """Write the report under a fresh name."""
        from ..evaluation.report import report_dict, write_report
        from .evaluation_text import evaluation_summary

        names: Sequence[str] = [one.concept for one in report.evaluations]
        (stem,) = patch_name(PLACEHOLDER, names)
        file = write_report(report, check_writable(fresh_file(make_folder(reports.folder), stem, ".html")))
        data: dict[str, Any] = {
            "report": file.stem,
            "verdict": report_dict(report)["verdict"],
            "concepts": [one.as_dict() for one in report.evaluations],
            "attacks": [one.as_dict() for one in report.attacks],
            "left_out": dict(report.left_out),
        }
        return Outcome(evaluation_summary(report, Path(file.name)), data)

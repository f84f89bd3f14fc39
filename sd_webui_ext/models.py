"""Request and response models of the REST routes, in the subset of pydantic that versions 1 and 2 share.

They declare names, types and defaults. The core validates values, with the same messages in every interface.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

__all__ = [
    "ActiveModel",
    "ApplyBody",
    "CombineBody",
    "DroppedModel",
    "EvaluateBody",
    "ForgetBody",
    "JobModel",
    "MethodModel",
    "NameBody",
    "PatchDetails",
    "PatchModel",
    "Problem",
    "SettingModel",
    "ThemeModel",
    "UnreadableModel",
    "request_of",
]


class Problem(BaseModel):
    """Why a request failed."""

    detail: str = Field(..., description="One sentence: what is wrong, with which input, and what to do.")


class ConceptBody(BaseModel):
    """One concept to forget."""

    name: str = Field(..., description="The concept, in the words a prompt would use.")
    kind: str = Field("object", description="object, style or identity.")
    replacement: str | None = Field(None, description="What to show in its place; null: no particular replacement.")
    images: list[str] = Field(
        [], description="Pictures of it, for methods that use some: PNG, JPEG or WebP, each as base64."
    )


class ForgetBody(BaseModel):
    """A request in the same JSON as in ComfyUI and on the command line, and what to do with the patch.

    Only ``images`` differ: they contain the pictures themselves, not paths.
    """

    schema_version: int = Field(1, alias="schema", description="Version of the request format: 1.")
    concepts: list[ConceptBody] = Field(
        [], description="The concepts to forget; at least one, unless there is a theme."
    )
    theme: str | None = Field(None, description="A theme whose concepts are forgotten too; /themes lists them.")
    theme_replacement: str | None = Field(None, description="Replacement of the theme's concepts that state none.")
    preserve: list[str] = Field([], description="The retain set: concepts that must not change.")
    method: str = Field("uce", description="One of the methods that /methods lists.")
    preset: str = Field("tuned", description="published or tuned.")
    settings: dict[str, Any] = Field({}, description="Overrides of single settings of the preset.")
    strength: float = Field(1.0, description="Scales the edit: above 0, at most 10.")
    seed: int = Field(0, description="Random seed of methods that sample noise.")
    name: str = Field(
        "", description="Name of the patch; %concept% stands for what it forgets, and a number is appended."
    )
    apply: float | None = Field(
        None, description="Strength at which to apply the patch to the loaded model once made; null: do not apply it."
    )
    pictures: int | None = Field(
        None, description="Number of picture pairs before and after to generate; null: as on the settings page."
    )


class EvaluateBody(BaseModel):
    """What to measure about a patch on the loaded model."""

    patch: str = Field(..., description="Name of a patch.")
    strength: float = Field(1.0, description="Multiplier of the patch.")
    concepts: list[str] = Field([], description="Concepts to measure; empty: those that the patch names.")
    count: int = Field(16, description="Pictures in each of the three cells, 4 to 1000.")
    seed: int = Field(0, description="Seed of the prompts and pictures.")
    steps: int = Field(16, description="Sampling steps per picture.")
    baselines: bool = Field(False, description="Also measure a negative prompt and safe guidance.")
    attacks: str = Field("none", description="Attacks that try to recover the concept: none, quick or standard.")
    m_score: bool = Field(False, description="Also compute Forget-Me-Not's M-Score.")
    full: bool = Field(
        False,
        description="Also measure wordings that no fit uses, every kept concept by itself, lower strengths, and "
        "pictures that start from the concept.",
    )
    benchmark: str = Field("automatic", description="automatic, world, embedded or checkpoints.")
    clip_judge: str = Field(
        "", description="The CLIP that judges a checkpoint's pictures: hub name of one that is downloaded already."
    )


class ApplyBody(BaseModel):
    """The strength at which to apply a patch."""

    strength: float = Field(1.0, description="From -10 to 10, other than 0.")


class NameBody(BaseModel):
    """A new name."""

    name: str = Field(..., description="The name, without folder and extension.")


class PartBody(BaseModel):
    """A patch and its strength."""

    name: str = Field(..., description="Name of a patch.")
    strength: float = Field(1.0, description="Its multiplier in the sum.")


class CombineBody(BaseModel):
    """Patches to combine into one."""

    parts: list[PartBody] = Field(..., description="At least two.")
    name: str = Field("", description="Name of the new patch; %concept% stands for what it forgets.")
    max_rank: int | None = Field(None, description="Upper bound of its rank; null: no bound, the sum is exact.")


class ThemeModel(BaseModel):
    """A theme: a list of concepts that are forgotten in one request."""

    name: str
    about: str = Field(..., description="The first comment of its file.")
    concepts: list[str] = Field(..., description="Its phrases.")


class SettingModel(BaseModel):
    """One setting of a method."""

    name: str
    kind: str = Field(..., description="whole, number, choice, switch, line (text) or list.")
    about: str = Field(..., description="What it does.")
    default: Any = Field(None, description="Its value in the preset 'tuned'; null: none.")
    options: list[str] = Field([], description="Allowed values, or allowed items of a list; empty: any.")
    low: float | None = Field(None, description="Inclusive bounds of a number; requests outside are rejected.")
    high: float | None = None
    optional: bool = Field(False, description="Whether it may be null.")
    advanced: bool = Field(False, description="Whether it is rarely needed.")
    group: str = Field("method", description="Heading for listings.")


class MethodModel(BaseModel):
    """A method."""

    id: str
    title: str
    paper: str
    takes_images: bool = Field(..., description="Whether it can use reference images.")
    trained: bool = Field(..., description="Whether it trains, which takes minutes; the others take seconds.")
    settings: list[SettingModel]
    presets: dict[str, dict[str, Any]] = Field(..., description="The settings of each preset.")


class JobModel(BaseModel):
    """The state of a job."""

    id: str
    kind: str = Field(..., description="forget or evaluate.")
    title: str
    state: str = Field(..., description="queued, running, done, failed or cancelled.")
    step: int = Field(..., description="Current step of the part that the message names.")
    total: int
    loss: float | None = None
    message: str = Field("", description="The part that is running.")
    seconds: float = Field(..., description="Time since it started.")
    seconds_left: float | None = Field(None, description="Estimated time left for this part; null: unknown.")
    stopping: bool = Field(..., description="Whether it is being cancelled.")
    error: str = Field("", description="Why it failed.")
    words: str = Field("", description="The result as text.")
    pictures: int = Field(0, description="Number of picture pairs, at /jobs/{id}/pictures/{number}.")
    result: dict[str, Any] | None = Field(None, description="The result as data.")


class PatchModel(BaseModel):
    """A patch in the Lora folder."""

    name: str
    file: str = Field(..., description="Path in the Lora folder.")
    bytes: int
    written: float = Field(..., description="Time of the file, in seconds since 1970.")
    concepts: list[str]
    method: str
    family: str
    base_model: str
    lora: str = Field(..., description="The tag that applies it in a prompt.")


class UnreadableModel(BaseModel):
    """A file of the Lora folder that cannot be read."""

    file: str = Field(..., description="Path in the Lora folder.")
    why: str = Field(..., description="The reason, in one sentence.")


class PatchDetails(PatchModel):
    """A patch with its details."""

    layers: int
    rank: int
    precision: str
    words: str = Field(..., description="A description of the patch.")
    metadata: dict[str, str]


class ActiveModel(BaseModel):
    """A patch in the loaded model's weights."""

    name: str
    strength: float
    in_force: bool = Field(..., description="Whether the weights currently contain it.")
    warning: str = Field("", description="What is known to happen at this strength; empty for a usual strength.")


class DroppedModel(BaseModel):
    """A patch that was applied and that the current checkpoint's weights do not contain."""

    name: str
    strength: float
    checkpoint: str = Field(..., description="The checkpoint that it was applied to.")
    same: bool = Field(..., description="Whether that is the current checkpoint, loaded again since.")


def request_of(body: ForgetBody, images: dict[int, list[str]]) -> dict[str, Any]:
    """The request in a body, as the JSON value that ``ForgetRequest.from_json`` reads.

    Args:
        images: Paths of the uploaded pictures, by the index of their concept.
    """
    concepts: list[dict[str, Any]] = []
    for number, one in enumerate(body.concepts):
        entry: dict[str, Any] = {"name": one.name, "kind": one.kind}
        if one.replacement is not None:
            entry["replacement"] = one.replacement
        if images.get(number):
            entry["images"] = images[number]
        concepts.append(entry)
    plain: dict[str, int | float | str | list[Any] | dict[str, Any]] = {
        "schema": body.schema_version,
        "concepts": concepts,
        "preserve": list(body.preserve),
        "method": body.method,
        "preset": body.preset,
        "settings": dict(body.settings),
        "strength": body.strength,
        "seed": body.seed,
    }
    if body.theme is not None:
        plain["theme"] = body.theme
    if body.theme_replacement is not None:
        plain["theme_replacement"] = body.theme_replacement
    return plain

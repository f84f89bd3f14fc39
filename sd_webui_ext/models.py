"""What the REST routes take and give: models in the part of pydantic that its versions 1 and 2 share.

They say names, types and defaults. What makes sense is checked where the work is done, in words that are the same in
every interface.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

__all__ = [
    "ActiveModel",
    "ApplyBody",
    "CombineBody",
    "EvaluateBody",
    "ForgetBody",
    "JobModel",
    "MethodModel",
    "NameBody",
    "PatchDetails",
    "PatchModel",
    "Problem",
    "SettingModel",
    "request_of",
]


class Problem(BaseModel):
    """Why something was refused."""

    detail: str = Field(..., description="One sentence: what is wrong, with which input, and what to do.")


class ConceptBody(BaseModel):
    """One thing to forget."""

    name: str = Field(..., description="What to forget, in the words a prompt would use.")
    kind: str = Field("object", description="object, style or identity.")
    replacement: str | None = Field(None, description="What to show instead; none: nothing in particular.")
    images: list[str] = Field(
        [], description="Pictures of it for methods that look at some: PNG, JPEG or WebP, each as base64."
    )


class ForgetBody(BaseModel):
    """A whole request, the same JSON as in ComfyUI and on the command line, and what to do with the patch.

    Only ``images`` differ: they are the pictures themselves, not their places.
    """

    schema_version: int = Field(1, alias="schema", description="Version of the request: 1.")
    concepts: list[ConceptBody] = Field(..., description="What to forget, at least one.")
    preserve: list[str] = Field([], description="Words that must go on working.")
    method: str = Field("uce", description="One of the methods that /methods lists.")
    preset: str = Field("tuned", description="published or tuned.")
    settings: dict[str, Any] = Field({}, description="Single settings of the method in place of the preset's.")
    strength: float = Field(1.0, description="Scales the edit: above 0, at most 10.")
    seed: int = Field(0, description="For methods that draw noise.")
    name: str = Field("", description="Name of the patch; %concept% stands for what it forgets, a number is added.")
    apply: float | None = Field(
        None, description="Strength to put it into the loaded model with as soon as it is made; none: not."
    )
    pictures: int | None = Field(
        None, description="Pairs of pictures to draw before and after; none: as on the settings page."
    )


class EvaluateBody(BaseModel):
    """What to measure of a patch on the loaded model."""

    patch: str = Field(..., description="Name of a patch.")
    strength: float = Field(1.0, description="How strong it is put on.")
    concepts: list[str] = Field([], description="What is to be gone; none: what the patch names.")
    count: int = Field(16, description="Pictures in each of the three cells, 4 to 1000.")
    seed: int = Field(0, description="Of the prompts and pictures.")
    steps: int = Field(16, description="Sampling steps of each picture.")
    baselines: bool = Field(False, description="Also measure a negative prompt and safe guidance.")
    attacks: str = Field("none", description="none, quick or standard: try to bring the concept back.")
    m_score: bool = Field(False, description="Also Forget-Me-Not's M-Score.")
    benchmark: str = Field("automatic", description="automatic, world, embedded or checkpoints.")
    clip_judge: str = Field(
        "", description="Who judges a checkpoint's pictures: the hub name of a CLIP that was downloaded before."
    )


class ApplyBody(BaseModel):
    """How strong a patch is put on."""

    strength: float = Field(1.0, description="From -10 to 10, other than 0.")


class NameBody(BaseModel):
    """A new name."""

    name: str = Field(..., description="Without folder and ending.")


class PartBody(BaseModel):
    """A patch at a strength."""

    name: str = Field(..., description="Name of a patch.")
    strength: float = Field(1.0, description="Its strength in the whole.")


class CombineBody(BaseModel):
    """Several patches that are to be one."""

    parts: list[PartBody] = Field(..., description="At least two.")
    name: str = Field("", description="Name of the new patch; %concept% stands for what it forgets.")
    max_rank: int | None = Field(None, description="Bound of its rank; none: the sum is exact.")


class SettingModel(BaseModel):
    """One setting of a method."""

    name: str
    kind: str = Field(..., description="whole, number, choice, switch, line (words) or list.")
    about: str = Field(..., description="What it does.")
    default: Any = Field(None, description="Its value in the preset 'tuned'; null: none.")
    options: list[str] = Field([], description="What it may be, or what its list may hold, where that is bounded.")
    low: float | None = Field(None, description="A number's bounds; a request outside of them is refused.")
    high: float | None = None
    optional: bool = Field(False, description="Whether it may be null.")
    advanced: bool = Field(False, description="Whether it is seldom needed.")
    group: str = Field("method", description="Heading that a listing may put it under.")


class MethodModel(BaseModel):
    """A method of forgetting."""

    id: str
    title: str
    paper: str
    takes_images: bool = Field(..., description="Whether it can look at a person's own pictures.")
    trained: bool = Field(..., description="Whether it is trained, which takes minutes; the others take seconds.")
    settings: list[SettingModel]
    presets: dict[str, dict[str, Any]] = Field(..., description="The settings of each preset.")


class JobModel(BaseModel):
    """A job as it stands."""

    id: str
    kind: str = Field(..., description="forget or evaluate.")
    title: str
    state: str = Field(..., description="queued, running, done, failed or cancelled.")
    step: int = Field(..., description="Of the part that the message names.")
    total: int
    loss: float | None = None
    message: str = Field("", description="What is being done.")
    seconds: float = Field(..., description="Since it began.")
    seconds_left: float | None = Field(None, description="That this part will still take, where it is known.")
    stopping: bool = Field(..., description="Whether it was asked to end.")
    error: str = Field("", description="Why it failed, in words.")
    words: str = Field("", description="What it came to, in words.")
    pictures: int = Field(0, description="Pairs of pictures before and after, at /jobs/{id}/pictures/{number}.")
    result: dict[str, Any] | None = Field(None, description="What it came to, as data.")


class PatchModel(BaseModel):
    """A patch in the Lora folder."""

    name: str
    file: str = Field(..., description="Its place in the Lora folder.")
    bytes: int
    written: float = Field(..., description="Seconds since 1970.")
    concepts: list[str]
    method: str
    family: str
    base_model: str
    lora: str = Field(..., description="What puts it on in a prompt.")


class PatchDetails(PatchModel):
    """A patch, looked into."""

    layers: int
    rank: int
    precision: str
    words: str = Field(..., description="What it is and what made it.")
    metadata: dict[str, str]


class ActiveModel(BaseModel):
    """A patch in the loaded model's weights."""

    name: str
    strength: float
    in_force: bool = Field(..., description="Whether the weights hold it now.")


def request_of(body: ForgetBody, images: dict[int, list[str]]) -> dict[str, Any]:
    """The request within a body as the JSON value that ``ForgetRequest.from_json`` reads; ``images`` are the places of
    the pictures by the number of their concept."""
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
    return plain

"""REST routes under ``/forget-concept/v1/``. Errors have a 4xx code and one sentence: ``{"detail": …}``."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Collection, Coroutine, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBasic

from ..core.errors import ForgetConceptError, RequestError
from ..core.files.json_text import parse_json
from ..core.files.names import printable
from ..core.methods.base import Method
from ..core.methods.registry import all_methods, plan_request
from ..core.request.request import ForgetRequest, strength_warning
from ..core.request.themes import load_theme, themes
from ..core.service.errors import BusyError, NotFoundError
from ..core.service.evaluate_job import EvaluateJob
from ..core.service.forget_job import ForgetJob
from ..core.service.forms import settings_json
from ..core.service.host_interface import Host
from ..core.service.jobs import Job
from ..core.service.patch_store import PatchStore, patch_store_of
from ..core.service.preview import png, row
from ..core.service.uploads import Uploads
from ..core.version import VERSION
from .guard import Credentials, foreign_host, foreign_origin
from .models import (
    ActiveModel,
    ApplyBody,
    CombineBody,
    DroppedModel,
    EvaluateBody,
    ForgetBody,
    JobModel,
    MethodModel,
    NameBody,
    PatchDetails,
    PatchModel,
    Problem,
    ThemeModel,
    UnreadableModel,
    request_of,
)

__all__ = ["PREFIX", "mount", "router_of"]

PREFIX = "/forget-concept/v1"
# size limits of a request body without and with pictures, in bytes
SMALL_BODY, LARGE_BODY = 256 * 2**10, 96 * 2**20
_WITH_PICTURES = "/forget"
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# documented error responses
_ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    code: {"model": Problem, "description": words}
    for code, words in {
        400: "The request is invalid.",
        401: "User name or password do not match --api-auth.",
        403: "The request comes from a page of another site, or was sent to an unknown host name.",
        404: "Nothing has this name.",
        409: "Another job is running.",
        413: "The body is too large.",
        415: "The body is not JSON.",
        422: "The body does not match the schema.",
    }.items()
}


class _LimitedRequest(Request):
    """A request that stops reading its body at the size limit, and parses it as JSON within bounds."""

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            limit = self._limit
            length = self.headers.get("content-length", "")
            if length.isdigit() and int(length[:12]) > limit:
                raise HTTPException(413, _too_large(limit))
            parts, size = [], 0
            async for part in self.stream():
                size += len(part)
                if size > limit:
                    raise HTTPException(413, _too_large(limit))
                parts.append(part)
            self._body = b"".join(parts)
        return self._body

    async def json(self) -> Any:
        try:
            return parse_json((await self.body()).decode("utf-8"), self._limit)
        except ValueError as error:
            why = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
            raise HTTPException(422, f"The body is not valid JSON: {why}.") from error

    @property
    def _limit(self) -> int:
        return LARGE_BODY if self.url.path.endswith(PREFIX + _WITH_PICTURES) else SMALL_BODY


def _too_large(limit: int) -> str:
    return f"The body is too large: this route accepts at most {limit // 2**10:,} kB."


@dataclasses.dataclass(frozen=True)
class _Guard:
    """Looks at the headers of every request before its body is read, and at the messages of answers.

    Args:
        credentials: Who may send requests; ``None``: everybody.
        known: Origins and host names beside those of the webui itself.
        folders: Folders of this machine that no answer names.
    """

    credentials: Credentials | None
    known: Callable[[], Collection[str]]
    folders: Callable[[], Sequence[Path]]

    def refusal(self, request: Request) -> Response | None:
        """The answer to a request that is refused."""
        headers, known = request.headers, self.known()
        # a page with a foreign host name has no password to send
        if self.credentials is None and (words := foreign_host(headers, known)) is not None:
            return _problem(403, words)
        changes = request.method not in ("GET", "HEAD", "OPTIONS")
        if changes and (words := foreign_origin(headers, known)) is not None:
            return _problem(403, words)
        if self.credentials is not None and not self.credentials.fit(headers.get("authorization", "")):
            answer = _problem(401, "User name or password are missing or wrong.")
            answer.headers["WWW-Authenticate"] = 'Basic charset="UTF-8"'
            return answer
        kind = headers.get("content-type", "").partition(";")[0].strip().casefold()
        has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        if changes and (kind or has_body) and kind != "application/json":
            return _problem(
                415, f"The body must be JSON: send the header 'Content-Type: application/json', not '{kind[:80]}'."
            )
        return None

    def shown(self, words: str) -> str:
        """A message without where this machine keeps its files."""
        for folder in self.folders():
            for path in {str(folder), os.path.realpath(folder)} - {os.sep}:
                words = words.replace(path + os.sep, "").replace(path, folder.name)
        return words


class _SentenceRoute(APIRoute):
    """A route behind a guard, which answers errors in one sentence."""

    guard: ClassVar[_Guard]

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            if (refused := self.guard.refusal(request)) is not None:
                return refused
            try:
                return await handle(_LimitedRequest(request.scope, request.receive))
            except RequestValidationError as error:
                return _problem(422, _validation_message(error.errors()))
            except ForgetConceptError as error:
                code = 409 if isinstance(error, BusyError) else 404 if isinstance(error, NotFoundError) else 400
                return _problem(code, self.guard.shown(str(error)))

        return handler


def _problem(code: int, words: str) -> JSONResponse:
    # a message repeats its input, which may not be valid Unicode
    return JSONResponse({"detail": printable(words)}, status_code=code)


def _validation_message(errors: Sequence[Any]) -> str:
    """The first error of a pydantic validation (version 1 or 2) as a sentence."""
    first = errors[0]
    where = [str(part) for part in first.get("loc", ()) if part != "body"]
    words = str(first.get("msg", "")).rstrip(".")
    if "json" in str(first.get("type", "")) or "jsondecode" in str(first.get("type", "")):
        return f"The body is not valid JSON: {(first.get('ctx') or {}).get('error') or words}."
    if not where:
        return f"The body must be a JSON object with this route's fields: {words}."
    more = f" ({len(errors)} fields are wrong in all)" if len(errors) > 1 else ""
    return f"The field '{'.'.join(where)}' is invalid: {words}{more}."


def mount(app: FastAPI, host: Host, auth: str | None, origins: Collection[str] = ()) -> None:
    """Add the routes to a webui's application.

    Args:
        app: The application.
        host: The webui.
        auth: The webui's ``--api-auth``; ``None`` for no authentication.
        origins: Origins of other sites whose pages may send requests.

    Raises:
        RequestError: If ``auth`` is malformed. No routes are added then.
    """
    # include_router would build every route a second time and delay the start of the webui
    app.router.routes.extend(router_of(patch_store_of(host), auth, origins).routes)


def router_of(store: PatchStore, auth: str | None = None, origins: Collection[str] = ()) -> APIRouter:
    """Build the router with all routes; ``auth`` and ``origins`` as in :func:`mount`."""
    guard = _Guard(
        None if auth is None else Credentials(auth),
        lambda: {*origins, *store.settings.hosts},
        lambda: (store.host.lora_folder(), store.host.data_folder(), Path.home()),
    )

    def about(job: Job) -> dict[str, Any]:
        return job.as_dict() | {"error": guard.shown(job.error)}

    router = APIRouter(
        prefix=PREFIX,
        tags=["Forget Concept"],
        route_class=type("_GuardedRoute", (_SentenceRoute,), {"guard": guard}),
        # for the schema; the guard has looked already
        dependencies=[] if auth is None else [Depends(HTTPBasic(auto_error=False))],
        responses=_ERROR_RESPONSES,
    )

    # -- methods -------------------------------------------------------------------------------------------------

    @router.get("/methods", response_model=list[MethodModel], summary="List the methods")
    def methods() -> Any:
        """All methods with their settings and presets."""
        return [_method(method) for method in all_methods().values()]

    @router.get("/themes", response_model=list[ThemeModel], summary="List the themes")
    def all_themes() -> Any:
        """All themes with their phrases; files in the folder 'themes' beside the extension's data come first."""
        found = [load_theme(name, store.theme_folders) for name in themes(store.theme_folders)]
        return [
            {"name": one.name, "about": one.about, "concepts": [concept.name for concept in one.concepts]}
            for one in found
        ]

    # -- jobs ----------------------------------------------------------------------------------------------------

    @router.post("/forget", response_model=JobModel, status_code=202, summary="Start a job that forgets")
    def forget(body: ForgetBody) -> Any:
        """Make a patch on the loaded model and save it in the Lora folder. Returns the job immediately."""
        settings = store.settings
        uploads = Uploads({number: one.images for number, one in enumerate(body.concepts) if one.images})
        try:
            job = ForgetJob(
                plan_request(
                    ForgetRequest.from_json(json.dumps(request_of(body, uploads.places))), store.theme_folders
                ),
                body.name,
                settings.folder,
                settings.precision,
                body.apply,
                settings.pairs if body.pictures is None else body.pictures,
                settings.steps,
            )
            return about(store.forget(job, uploads.remove))
        except BaseException:
            uploads.remove()
            raise

    @router.post("/evaluate", response_model=JobModel, status_code=202, summary="Start a job that evaluates")
    def evaluate(body: EvaluateBody) -> Any:
        """Measure what a patch forgot and what it retained, and write a report. Returns the job immediately."""
        if body.clip_judge and not _HUB_NAME.fullmatch(body.clip_judge):
            raise RequestError(
                "The field 'clip_judge' must be the hub name of a CLIP that this machine has downloaded, such as "
                "openai/clip-vit-base-patch32: the API reads no folders."
            )
        job = EvaluateJob(
            body.patch,
            body.strength,
            tuple(body.concepts),
            body.count,
            body.seed,
            body.steps,
            body.baselines,
            body.attacks,
            body.m_score,
            body.full,
            body.benchmark,
            body.clip_judge,
        )
        return about(store.evaluate(job))

    @router.get("/jobs", response_model=list[JobModel], summary="List recent jobs")
    def jobs() -> Any:
        """The jobs that are still remembered, newest last."""
        return [about(job) for job in store.jobs.all()]

    @router.get("/jobs/{job_id}", response_model=JobModel, summary="Get a job")
    def job(job_id: str) -> Any:
        """State, step and time left of a job; its result once it is done."""
        return about(store.jobs.get(job_id))

    @router.post("/jobs/{job_id}/cancel", response_model=JobModel, summary="Interrupt a job")
    def cancel(job_id: str) -> Any:
        """Stop a job at its next step, without saving anything. Does nothing to a finished job."""
        return about(store.jobs.cancel(job_id))

    @router.get(
        "/jobs/{job_id}/pictures/{number}",
        response_model=None,
        response_class=Response,
        responses={200: {"content": {"image/png": {}}, "description": "Left without the patch, right with it."}},
        summary="Get a pair of pictures",
    )
    def picture(job_id: str, number: int) -> Any:
        """Pictures before and after of the same prompt and seed, side by side, as PNG. Pairs count from 1."""
        found = store.jobs.get(job_id).outcome
        if found is None or not 1 <= number <= len(found.pairs):
            raise NotFoundError(f"The job has no pair of pictures {number}: pairs count from 1.")
        pair = found.pairs[number - 1]
        images = torch.stack([pair.before, pair.after]).movedim(1, -1).float() / 255
        return Response(png(row(images), {"prompt": pair.prompt, "seed": str(pair.seed)}), media_type="image/png")

    # -- patches -------------------------------------------------------------------------------------------------

    @router.get("/patches", response_model=list[PatchModel], summary="List the patches")
    def patches() -> Any:
        """The patches in the Lora folder that Forget Concept made, newest first."""
        return [entry.as_dict() for entry in store.library.entries()]

    @router.get("/unreadable", response_model=list[UnreadableModel], summary="List the files that cannot be read")
    def unreadable() -> Any:
        """The files of the Lora folder that could be patches but cannot be read, each with the reason."""
        return [{"file": place, "why": why} for place, why in store.library.unreadable()]

    @router.post("/patches/combine", response_model=PatchModel, status_code=201, summary="Combine patches")
    def combine(body: CombineBody) -> Any:
        """Save the sum of several patches, each at its strength, as a new file."""
        parts = [(part.name, part.strength) for part in body.parts]
        return store.combine(parts, body.name, body.max_rank)[0].as_dict()

    @router.get("/patches/{name}", response_model=PatchDetails, summary="Inspect a patch")
    def inspect(name: str) -> Any:
        """What a patch forgets, how it was made, and its size."""
        return store.library.inspect(name)

    @router.post("/patches/{name}/apply", response_model=list[ActiveModel], summary="Apply a patch")
    def apply(name: str, body: ApplyBody | None = None) -> Any:
        """Apply a patch to the loaded model's weights, or change its strength there."""
        store.apply(name, (body or ApplyBody()).strength)
        return _active(store)

    @router.post("/patches/{name}/remove", response_model=list[ActiveModel], summary="Remove a patch from the model")
    def remove(name: str) -> Any:
        """Remove a patch from the loaded model; this restores the weights exactly."""
        store.remove(name)
        return _active(store)

    @router.post("/patches/{name}/rename", response_model=PatchModel, summary="Rename a patch")
    def rename(name: str, body: NameBody) -> Any:
        """Rename the file, its picture and its card."""
        return store.rename(name, body.name).as_dict()

    @router.delete(
        "/patches/{name}", status_code=204, response_model=None, response_class=Response, summary="Delete a patch"
    )
    def delete(name: str) -> Any:
        """Delete the file, its picture and its card permanently."""
        store.delete(name)
        return Response(status_code=204)

    @router.get("/active", response_model=list[ActiveModel], summary="List the active patches")
    def active() -> Any:
        """The patches in the loaded model's weights, in the order in which they were applied."""
        return _active(store)

    @router.get("/dropped", response_model=list[DroppedModel], summary="List the dropped patches")
    def dropped() -> Any:
        """The patches that were applied and not removed, and that the current checkpoint's weights do not contain.

        Loading another checkpoint, or the same one again, takes patches out of the weights.
        """
        return [dataclasses.asdict(one) for one in store.dropped()]

    @router.post("/dropped/apply", response_model=list[ActiveModel], summary="Apply the dropped patches again")
    def apply_again() -> Any:
        """Apply every dropped patch to the loaded model at its strength."""
        store.apply_again()
        return _active(store)

    @router.post("/dropped/dismiss", response_model=list[DroppedModel], summary="Leave the dropped patches out")
    def dismiss() -> Any:
        """No longer list the dropped patches; the model stays as it is."""
        store.dismiss_dropped()
        return [dataclasses.asdict(one) for one in store.dropped()]

    # -- reports -------------------------------------------------------------------------------------------------

    @router.get("/reports", response_model=list[str], summary="List the reports")
    def reports() -> Any:
        """Names of the reports, newest first."""
        return store.reports.names()

    @router.get(
        "/reports/{name}.html",
        response_model=None,
        response_class=Response,
        responses={200: {"content": {"text/html": {}}, "description": "A self-contained page."}},
        summary="Get a report as a page",
    )
    def report_page(name: str) -> Any:
        """The report of an evaluation as HTML."""
        return Response(store.reports.find(name, ".html").read_bytes(), media_type="text/html; charset=utf-8")

    @router.get("/reports/{name}.json", response_model=None, response_class=Response, summary="Get a report's scores")
    def report_figures(name: str) -> Any:
        """The scores of a report as JSON."""
        return Response(store.reports.find(name, ".json").read_bytes(), media_type="application/json")

    @router.get("/openapi.json", include_in_schema=False)
    def schema() -> Any:
        """The OpenAPI schema of these routes only."""
        return get_openapi(title="Forget Concept", version=VERSION, description=__doc__, routes=router.routes)

    return router


# -- what routes share ---------------------------------------------------------------------------------------------


def _method(method: type[Method]) -> dict[str, Any]:
    presets = {name: _json_values(dataclasses.asdict(values)) for name, values in method.presets.items()}
    return {
        "id": method.id,
        "title": method.title,
        "paper": method.paper,
        "takes_images": method.takes_images,
        "trained": method.trained,
        "settings": settings_json(method),
        "presets": presets,
    }


def _json_values(values: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _active(store: PatchStore) -> list[dict[str, Any]]:
    return [
        {
            "name": one.name,
            "strength": one.strength,
            "in_force": one.in_force,
            "warning": strength_warning(one.strength) or "",
        }
        for one in store.active()
    ]

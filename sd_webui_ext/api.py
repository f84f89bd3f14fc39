"""REST routes under ``/forget-concept/v1/``. Errors have a 4xx code and one sentence: ``{"detail": …}``."""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import torch
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBasic, HTTPBasicCredentials

from ..core.errors import ForgetConceptError, RequestError
from ..core.methods.base import Method
from ..core.methods.registry import all_methods, plan_request
from ..core.request.request import ForgetRequest, strength_warning
from ..core.request.themes import load_theme, themes
from ..core.service.errors import BusyError, NotFoundError
from ..core.service.evaluate_job import EvaluateJob
from ..core.service.forget_job import ForgetJob
from ..core.service.forms import settings_json
from ..core.service.host_interface import Host
from ..core.service.patch_store import PatchStore, patch_store_of
from ..core.service.preview import png, row
from ..core.service.uploads import Uploads
from ..core.version import VERSION
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
        404: "Nothing has this name.",
        409: "Another job is running.",
        413: "The body is too large.",
        422: "The body does not match the schema.",
    }.items()
}


class _LimitedRequest(Request):
    """A request that stops reading its body at the size limit."""

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            path = self.url.path
            limit = LARGE_BODY if path.endswith(PREFIX + _WITH_PICTURES) else SMALL_BODY
            length = self.headers.get("content-length", "")
            if length.isdigit() and int(length) > limit:
                raise HTTPException(413, _too_large(limit))
            parts, size = [], 0
            async for part in self.stream():
                size += len(part)
                if size > limit:
                    raise HTTPException(413, _too_large(limit))
                parts.append(part)
            self._body = b"".join(parts)
        return self._body


def _too_large(limit: int) -> str:
    return f"The body is too large: this route accepts at most {limit // 2**10:,} kB."


class _SentenceRoute(APIRoute):
    """A route that answers errors in one sentence."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await handle(_LimitedRequest(request.scope, request.receive))
            except RequestValidationError as error:
                return _problem(422, _validation_message(error.errors()))
            except BusyError as error:
                return _problem(409, str(error))
            except NotFoundError as error:
                return _problem(404, str(error))
            except ForgetConceptError as error:
                return _problem(400, str(error))

        return handler


def _problem(code: int, words: str) -> JSONResponse:
    return JSONResponse({"detail": words}, status_code=code)


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


def _basic_auth(auth: str) -> Callable[..., None]:
    """A FastAPI dependency for HTTP basic authentication against ``--api-auth``, ``user:password,user:password``."""
    known = []
    for entry in auth.split(","):
        user, colon, password = entry.strip().partition(":")
        if not colon or not user:
            # do not repeat the entry: it contains a password
            raise RequestError("--api-auth must have the form user:password, or several of them separated by commas.")
        known.append((user.encode(), password.encode()))

    def check(given: HTTPBasicCredentials = Depends(HTTPBasic())) -> None:  # noqa: B008 - FastAPI's idiom
        fits = False
        for user, password in known:
            # compare all of them in full, so that timing does not reveal a near match
            same_user = secrets.compare_digest(given.username.encode(), user)
            same_password = secrets.compare_digest(given.password.encode(), password)
            fits |= same_user and same_password
        if not fits:
            raise HTTPException(401, "User name or password are wrong.", {"WWW-Authenticate": "Basic"})

    return check


def mount(app: FastAPI, host: Host, auth: str | None) -> None:
    """Add the routes to a webui's application.

    Args:
        auth: The webui's ``--api-auth``; ``None`` for no authentication.

    Raises:
        RequestError: If ``auth`` is malformed. No routes are added then.
    """
    # include_router would build every route a second time and delay the start of the webui
    app.router.routes.extend(router_of(patch_store_of(host), auth).routes)


def router_of(store: PatchStore, auth: str | None = None) -> APIRouter:
    """Build the router with all routes; ``auth`` as in :func:`mount`."""
    guards = [] if auth is None else [Depends(_basic_auth(auth))]
    router = APIRouter(
        prefix=PREFIX,
        tags=["Forget Concept"],
        route_class=_SentenceRoute,
        dependencies=guards,
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
            return store.forget(job, uploads.remove).as_dict()
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
            body.benchmark,
            body.clip_judge,
        )
        return store.evaluate(job).as_dict()

    @router.get("/jobs", response_model=list[JobModel], summary="List recent jobs")
    def jobs() -> Any:
        """The jobs that are still remembered, newest last."""
        return [job.as_dict() for job in store.jobs.all()]

    @router.get("/jobs/{job_id}", response_model=JobModel, summary="Get a job")
    def job(job_id: str) -> Any:
        """State, step and time left of a job; its result once it is done."""
        return store.jobs.get(job_id).as_dict()

    @router.post("/jobs/{job_id}/cancel", response_model=JobModel, summary="Interrupt a job")
    def cancel(job_id: str) -> Any:
        """Stop a job at its next step, without saving anything. Does nothing to a finished job."""
        return store.jobs.cancel(job_id).as_dict()

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

"""REST: ``/forget-concept/v1/``. Whatever is wrong is answered with a 4xx code and one sentence, ``{"detail": …}``."""

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
from ..core.request.request import ForgetRequest
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
    EvaluateBody,
    ForgetBody,
    JobModel,
    MethodModel,
    NameBody,
    PatchDetails,
    PatchModel,
    Problem,
    request_of,
)

__all__ = ["PREFIX", "mount", "router_of"]

PREFIX = "/forget-concept/v1"
# of a body without and with pictures
SMALL_BODY, LARGE_BODY = 256 * 2**10, 96 * 2**20
_WITH_PICTURES = "/forget"
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# no model is asked for: a job that is over does not need one
_REFUSED: dict[int | str, dict[str, Any]] = {
    code: {"model": Problem, "description": words}
    for code, words in {
        400: "It cannot be done as asked.",
        401: "The name or the password is not one of --api-auth.",
        404: "There is none of this name.",
        409: "Another job is running.",
        413: "The body is too large.",
        422: "The body is not of this form.",
    }.items()
}


class _LimitedRequest(Request):
    """A request whose body is read no further than is allowed."""

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            path = self.url.path
            limit = LARGE_BODY if path.endswith(PREFIX + _WITH_PICTURES) else SMALL_BODY
            said = self.headers.get("content-length", "")
            if said.isdigit() and int(said) > limit:
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
    return f"The body is too large: at most {limit // 2**10:,} kB are taken here."


class _InWords(APIRoute):
    """A route that answers what is wrong in one sentence."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await handle(_LimitedRequest(request.scope, request.receive))
            except RequestValidationError as error:
                return _problem(422, _spoken(error.errors()))
            except BusyError as error:
                return _problem(409, str(error))
            except NotFoundError as error:
                return _problem(404, str(error))
            except ForgetConceptError as error:
                return _problem(400, str(error))

        return handler


def _problem(code: int, words: str) -> JSONResponse:
    return JSONResponse({"detail": words}, status_code=code)


def _spoken(errors: Sequence[Any]) -> str:
    """What pydantic, of whichever version, found first, in a sentence."""
    first = errors[0]
    where = [str(part) for part in first.get("loc", ()) if part != "body"]
    words = str(first.get("msg", "")).rstrip(".")
    if "json" in str(first.get("type", "")) or "jsondecode" in str(first.get("type", "")):
        return f"The body is not valid JSON: {(first.get('ctx') or {}).get('error') or words}."
    if not where:
        return f"The body must be a JSON object with this route's fields: {words}."
    more = f" ({len(errors)} fields are wrong in all)" if len(errors) > 1 else ""
    return f"The field '{'.'.join(where)}' is not as it must be: {words}{more}."


def _checked(auth: str) -> Callable[..., None]:
    """A dependency that lets in only those whom ``--api-auth`` names, ``user:password,user:password``."""
    known = []
    for entry in auth.split(","):
        user, colon, password = entry.strip().partition(":")
        if not colon or not user:
            # the entry holds a password: it is not repeated
            raise RequestError("--api-auth must be of the form user:password, several of them separated by commas.")
        known.append((user.encode(), password.encode()))

    def check(given: HTTPBasicCredentials = Depends(HTTPBasic())) -> None:  # noqa: B008 - FastAPI's way
        fits = False
        for user, password in known:
            # every one of them is compared whole: the time says nothing of which came near
            same_user = secrets.compare_digest(given.username.encode(), user)
            same_password = secrets.compare_digest(given.password.encode(), password)
            fits |= same_user and same_password
        if not fits:
            raise HTTPException(401, "The name or the password is wrong.", {"WWW-Authenticate": "Basic"})

    return check


def mount(app: FastAPI, host: Host, auth: str | None) -> None:
    """Add the routes to a webui's application; ``auth`` is what it was given as ``--api-auth``, if anything.

    Raises :class:`RequestError` where that is malformed: without it nothing is let in.
    """
    # include_router would build each of them a second time, which the start of the webui would wait for
    app.router.routes.extend(router_of(patch_store_of(host), auth).routes)


def router_of(store: PatchStore, auth: str | None = None) -> APIRouter:
    """Every route."""
    guards = [] if auth is None else [Depends(_checked(auth))]
    router = APIRouter(
        prefix=PREFIX, tags=["Forget Concept"], route_class=_InWords, dependencies=guards, responses=_REFUSED
    )

    # -- methods -------------------------------------------------------------------------------------------------

    @router.get("/methods", response_model=list[MethodModel], summary="The methods of forgetting")
    def methods() -> Any:
        """Every method with its settings and presets."""
        return [_method(method) for method in all_methods().values()]

    # -- jobs ----------------------------------------------------------------------------------------------------

    @router.post("/forget", response_model=JobModel, status_code=202, summary="Forget: begin a job")
    def forget(body: ForgetBody) -> Any:
        """Work out a patch on the loaded model and save it in the Lora folder. Answers at once with the job."""
        settings = store.settings
        uploads = Uploads({number: one.images for number, one in enumerate(body.concepts) if one.images})
        try:
            asked = ForgetJob(
                plan_request(ForgetRequest.from_json(json.dumps(request_of(body, uploads.places)))),
                body.name,
                settings.folder,
                settings.precision,
                body.apply,
                settings.pairs if body.pictures is None else body.pictures,
                settings.steps,
            )
            return store.forget(asked, uploads.remove).as_dict()
        except BaseException:
            uploads.remove()
            raise

    @router.post("/evaluate", response_model=JobModel, status_code=202, summary="Evaluate: begin a job")
    def evaluate(body: EvaluateBody) -> Any:
        """Measure what a patch forgot and what it kept, and write a report. Answers at once with the job."""
        if body.clip_judge and not _HUB_NAME.fullmatch(body.clip_judge):
            raise RequestError(
                "The field 'clip_judge' must be the hub name of a CLIP that was downloaded before, such as "
                "openai/clip-vit-base-patch32: no folder of this machine is read for a caller."
            )
        asked = EvaluateJob(
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
        return store.evaluate(asked).as_dict()

    @router.get("/jobs", response_model=list[JobModel], summary="The last jobs")
    def jobs() -> Any:
        """Every job that is still known, the newest last."""
        return [job.as_dict() for job in store.jobs.all()]

    @router.get("/jobs/{job_id}", response_model=JobModel, summary="A job as it stands")
    def job(job_id: str) -> Any:
        """State, step, time left and, once it is done, the result."""
        return store.jobs.get(job_id).as_dict()

    @router.post("/jobs/{job_id}/cancel", response_model=JobModel, summary="Interrupt a job")
    def cancel(job_id: str) -> Any:
        """Ask a job to end at its next step; nothing is saved then. One that is over stays as it is."""
        return store.jobs.cancel(job_id).as_dict()

    @router.get(
        "/jobs/{job_id}/pictures/{number}",
        response_model=None,
        response_class=Response,
        responses={200: {"content": {"image/png": {}}, "description": "Left without the patch, right with it."}},
        summary="A picture before and after",
    )
    def picture(job_id: str, number: int) -> Any:
        """A pair of pictures (counted from 1) of the same prompt and seed, side by side, as PNG."""
        found = store.jobs.get(job_id).outcome
        if found is None or not 1 <= number <= len(found.pairs):
            raise NotFoundError(f"The job has no picture {number}.")
        pair = found.pairs[number - 1]
        images = torch.stack([pair.before, pair.after]).movedim(1, -1).float() / 255
        return Response(png(row(images), {"prompt": pair.prompt, "seed": str(pair.seed)}), media_type="image/png")

    # -- patches -------------------------------------------------------------------------------------------------

    @router.get("/patches", response_model=list[PatchModel], summary="The patches in the Lora folder")
    def patches() -> Any:
        """Those that were made by Forget Concept, the newest first."""
        return [entry.as_dict() for entry in store.library.entries()]

    @router.post("/patches/combine", response_model=PatchModel, status_code=201, summary="One patch of several")
    def combine(body: CombineBody) -> Any:
        """The sum of several patches at their strengths, as a new file."""
        parts = [(part.name, part.strength) for part in body.parts]
        return store.combine(parts, body.name, body.max_rank)[0].as_dict()

    @router.get("/patches/{name}", response_model=PatchDetails, summary="Look into a patch")
    def inspect(name: str) -> Any:
        """What it forgets, how it was made, its size."""
        return store.library.inspect(name)

    @router.post("/patches/{name}/apply", response_model=list[ActiveModel], summary="Put a patch on")
    def apply(name: str, body: ApplyBody | None = None) -> Any:
        """Put it into the loaded model's weights at once, or change its strength there."""
        store.apply(name, (body or ApplyBody()).strength)
        return _active(store)

    @router.post("/patches/{name}/remove", response_model=list[ActiveModel], summary="Take a patch off")
    def remove(name: str) -> Any:
        """Take it out of the loaded model; the weights are then what they were."""
        store.remove(name)
        return _active(store)

    @router.post("/patches/{name}/rename", response_model=PatchModel, summary="Rename a patch")
    def rename(name: str, body: NameBody) -> Any:
        """Give the file, its picture and its card another name."""
        return store.rename(name, body.name).as_dict()

    @router.delete(
        "/patches/{name}", status_code=204, response_model=None, response_class=Response, summary="Delete a patch"
    )
    def delete(name: str) -> Any:
        """Remove the file, its picture and its card for good."""
        store.delete(name)
        return Response(status_code=204)

    @router.get("/active", response_model=list[ActiveModel], summary="What is on the loaded model")
    def active() -> Any:
        """The patches in the loaded model's weights, in the order in which they were put on."""
        return _active(store)

    # -- reports -------------------------------------------------------------------------------------------------

    @router.get("/reports", response_model=list[str], summary="The reports")
    def reports() -> Any:
        """Their names, the newest first."""
        return store.reports.names()

    @router.get(
        "/reports/{name}.html",
        response_model=None,
        response_class=Response,
        responses={200: {"content": {"text/html": {}}, "description": "One page that needs nothing else."}},
        summary="A report as a page",
    )
    def report_page(name: str) -> Any:
        """The report of an evaluation."""
        return Response(store.reports.find(name, ".html").read_bytes(), media_type="text/html; charset=utf-8")

    @router.get("/reports/{name}.json", response_model=None, response_class=Response, summary="A report's figures")
    def report_figures(name: str) -> Any:
        """The same as JSON."""
        return Response(store.reports.find(name, ".json").read_bytes(), media_type="application/json")

    @router.get("/openapi.json", include_in_schema=False)
    def schema() -> Any:
        """These routes alone, whatever else the webui serves."""
        return get_openapi(title="Forget Concept", version=VERSION, description=__doc__, routes=router.routes)

    return router


# -- what routes share ---------------------------------------------------------------------------------------------


def _method(method: type[Method]) -> dict[str, Any]:
    presets = {name: _plain(dataclasses.asdict(values)) for name, values in method.presets.items()}
    return {
        "id": method.id,
        "title": method.title,
        "paper": method.paper,
        "takes_images": method.takes_images,
        "trained": method.trained,
        "settings": settings_json(method),
        "presets": presets,
    }


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _active(store: PatchStore) -> list[dict[str, Any]]:
    return [{"name": one.name, "strength": one.strength, "in_force": one.in_force} for one in store.active()]

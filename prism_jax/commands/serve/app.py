"""The routes of the server."""

from collections.abc import Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from prism_jax.commands.serve import exchange, measures
from prism_jax.commands.serve.refusals import Refusal


def make(
    front: exchange.Front,
    counted: measures.Measures,
    works: dict[str, exchange.Work],
    models: Sequence[dict[str, Any]],
    is_healthy: Callable[[], bool],
) -> Starlette:
    """Return the application.

    Args:
      works: of the routes under /v1 whose requests have a body.
      models: as `/v1/models` lists them.
    """

    async def health(request: Request) -> Response:
        del request
        if is_healthy():
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "stopping"}, status_code=503)

    async def metrics(request: Request) -> Response:
        del request
        return Response(counted.page(), headers={"content-type": measures.CONTENT_TYPE})

    async def list_models(request: Request) -> Response:
        front.check_key(request.headers)
        return JSONResponse({"object": "list", "data": list(models)})

    async def show_model(request: Request) -> Response:
        front.check_key(request.headers)
        name = request.path_params["name"]
        for model in models:
            if model["id"] == name:
                return JSONResponse(model)
        raise Refusal(
            f"there is no model {name[:100]!r}", status=404, field="model", code="model_not_found"
        )

    routes = [
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/v1/models", list_models),
        Route("/v1/models/{name:path}", show_model),
    ]
    routes += [
        Route(f"/v1/{name}", front.route(name, work), methods=["POST"])
        for name, work in works.items()
    ]
    handlers = {Refusal: _refused, HTTPException: _no_route}
    return Starlette(routes=routes, exception_handlers=handlers)


async def _refused(request: Request, error: Exception) -> Response:
    del request
    assert isinstance(error, Refusal), error
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers())


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), error
    what = {404: "there is no", 405: "another method is needed for"}.get(error.status_code, "")
    refusal = Refusal(
        f"{what} {request.url.path[:100]}".strip(), status=error.status_code, code="unknown_url"
    )
    return JSONResponse(
        refusal.body(), status_code=error.status_code, headers=dict(error.headers or {})
    )

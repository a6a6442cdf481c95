"""The description of the HTTP API, against the API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import pytest

from regionspot.serving.contract import CODES, Limits
from regionspot.serving.gateway import GatewaySettings, make_app
from regionspot.serving.gateway.errors import STATUS
from regionspot.serving.gateway.form import KEYS, Form, question_of
from regionspot.serving.gateway.openapi import description
from tests.serving.gateways import GOOD, PICTURE, WORDS, Untouched, ask, running

DOCUMENT = description()
JsonSchema = import_module("jsonschema").Draft202012Validator  # comes without types


def validator(schema: str) -> Any:
    return JsonSchema(
        {"$ref": f"#/components/schemas/{schema}", "components": DOCUMENT["components"]}
    )


def parts(value: Any) -> Iterator[Any]:
    yield value
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from parts(part)


def operations() -> dict[tuple[str, str], Any]:
    return {
        (path, method): operation
        for path, found in DOCUMENT["paths"].items()
        for method, operation in found.items()
        if method != "parameters"
    }


def test_it_is_served() -> None:
    with running(GatewaySettings("unused:1"), Untouched) as client:
        answer = client.get("/openapi.json")
        assert answer.headers["content-type"] == "application/json"
        assert answer.json() == json.loads(json.dumps(DOCUMENT))


def test_its_schemas_are_schemas() -> None:
    for schema in DOCUMENT["components"]["schemas"].values():
        JsonSchema.check_schema(schema)


def test_its_references_lead_somewhere() -> None:
    used = {part["$ref"] for part in parts(DOCUMENT) if isinstance(part, dict) and "$ref" in part}
    for reference in used:
        place: Any = DOCUMENT
        for name in reference.removeprefix("#/").split("/"):
            place = place[name]
    components = DOCUMENT["components"]
    known = {f"#/components/schemas/{name}" for name in components["schemas"]}
    known |= {f"#/components/responses/{name}" for name in components["responses"]}
    assert used == known
    assert {operation["operationId"] for operation in operations().values()} == {
        *("recognize", "info", "health", "ready", "metrics", "openapi"),
        *("vocabularies", "vocabulary", "putVocabulary", "deleteVocabulary"),
    }


def test_it_names_every_route() -> None:
    app = make_app(GatewaySettings("unused:1"), Untouched)
    routes = {getattr(route, "path") for route in app.routes}  # noqa: B009 - BaseRoute has none
    served = {path.replace(":path}", "}") for path in routes}
    assert set(DOCUMENT["paths"]) == served - {"/", "/static/{name}"}


def test_it_names_every_key_code_and_limit() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    assert set(schemas["Question"]["properties"]) == set(KEYS)
    assert schemas["Error"]["properties"]["error"]["properties"]["code"]["enum"] == list(CODES)
    limits = set(schemas["Info"]["properties"]["limits"]["properties"])
    assert limits == {*Limits().to_json(), "max_body_bytes"}
    statuses = set(DOCUMENT["paths"]["/v1/recognize"]["post"]["responses"])
    assert statuses == {"200", "408", "415", *map(str, STATUS.values())}


def test_its_examples_are_ones() -> None:
    examples = DOCUMENT["components"]["schemas"]["Question"]["examples"]
    for example in examples:
        validator("Question").validate(example)
        question_of(Form(json.dumps(example), PICTURE, "a.png"), Limits())
    answer = DOCUMENT["paths"]["/v1/recognize"]["post"]["responses"]["200"]["content"]
    validator("Answer").validate(answer["application/json"]["example"])
    failures = DOCUMENT["components"]["responses"].values()
    found = [failure["content"]["application/json"].get("example") for failure in failures]
    assert any(found)
    for example in filter(None, found):
        validator("Error").validate(example)


@pytest.mark.parametrize("change", [{"boxes": [[1, 2, 3]]}, {"words": [1]}, {"masks": "yes"}])
def test_it_refuses_what_the_gateway_refuses(change: dict[str, Any]) -> None:
    assert not validator("Question").is_valid({**GOOD, **change})


def test_answers_are_as_it_says(server: Any, picture: Path, boxes: list[list[float]]) -> None:
    with running(GatewaySettings(server.ports.grpc_url)) as client:

        def check(answer: httpx.Response, path: str, method: str) -> None:
            found = operations()[path, method]["responses"][str(answer.status_code)]
            if "$ref" in found:
                name = found["$ref"].rpartition("/")[2]
                found = DOCUMENT["components"]["responses"][name]
            schema = found["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
            validator(schema).validate(answer.json())
            assert set(found.get("headers", {})) <= {name.title() for name in answer.headers}

        image = picture.read_bytes()
        for masks in (False, True):
            answer = ask(client, image, boxes=boxes, words=WORDS, masks=masks)
            check(answer, "/v1/recognize", "post")
        points = ask(client, image, points=[[100, 100]], point_labels=[1], words=WORDS)
        assert points.status_code == 200
        check(points, "/v1/recognize", "post")
        check(ask(client, image, boxes=[[9, 9, 1, 1]], words=WORDS), "/v1/recognize", "post")
        check(client.post("/v1/recognize"), "/v1/recognize", "post")
        for path in ("/v1/info", "/healthz", "/readyz", "/readyz?upstream=1", "/v1/vocabularies"):
            check(client.get(path), path.partition("?")[0], "get")
        one = "/v1/vocabularies/{name}"
        for name in ("pets", "toys", "-"):
            path = f"/v1/vocabularies/{name}"
            contents: list[Any] = [{"words": ["red toy"]}, ["green toy", "red toy"], [], 7]
            for content in contents:
                check(client.put(path, json=content), one, "put")
            check(client.get(path), one, "get")
            assert client.delete(path).status_code in (204, 404, 422)
            check(client.delete(path), one, "delete")

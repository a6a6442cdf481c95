"""The API's description, OpenAPI 3.1, out of the tables that the code itself uses."""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from typing import Any

import regionspot
from regionspot.serving.contract import CODES, DEFAULT_TOP_K, Limits
from regionspot.serving.gateway.errors import STATUS

Json = dict[str, Any]

_BOX = {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4}
_POINT = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
_LABEL = {"enum": [0, 1]}
_ANSWERS_WITH_RETRY_AFTER = (429, 503)

QUESTION_EXAMPLE: Json = {
    "boxes": [[13, 97, 130, 204]],
    "words": ["brown toy with a black border", "plain green toy"],
    "top_k": 2,
}
ANSWER_EXAMPLE: Json = {
    "image": {"file_name": "000003.jpg", "width": 256, "height": 256},
    "regions": [
        {
            "box": [13.0, 97.0, 130.0, 204.0],
            "class": "brown toy with a black border",
            "score": 0.98,
            "top": [["brown toy with a black border", 0.98], ["plain green toy", 0.02]],
            "iou": None,
            "mask": None,
        }
    ],
    "image_handle": "5f0c62f1e7e04d8c",
    "cached": False,
    "model_version": "9d1c44a07f5e",
    "vocabulary_version": "c2b7d6f0a913",
    "request_id": "0b9cd6b0a5a54d1f9a7f2f4d5c2f8a11",
    "took_ms": 31.4,
}
ERROR_EXAMPLE: Json = {
    "error": {
        "code": "REGION_INVALID",
        "message": "box 0 lies outside the image",
        "request_id": "0b9cd6b0a5a54d1f9a7f2f4d5c2f8a11",
    }
}


@cache
def description() -> Json:
    """The document at /openapi.json."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "regionspot",
            "version": regionspot.__version__,
            "description": "Names regions of an image, out of any words.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": {
            "/v1/recognize": {"post": _recognize()},
            "/v1/info": {"get": _get("info", "What the server runs, and what it takes.", "Info")},
            "/v1/vocabularies": {
                "get": _get(
                    "vocabularies", "All vocabularies, without their words.", "Vocabularies"
                )
            },
            "/v1/vocabularies/{name}": _vocabulary(),
            "/healthz": {"get": _get("health", "Whether the process lives.", "Health", open_=True)},
            "/readyz": {"get": _ready()},
            "/metrics": {"get": _metrics()},
            "/openapi.json": {"get": _document()},
        },
        "components": {
            "schemas": _schemas(),
            "responses": {
                f"Status{status}": _failure(status, codes) for status, codes in _codes().items()
            },
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"token": []}, {}],
    }


def _recognize() -> Json:
    form = {
        "schema": {"$ref": "#/components/schemas/Form"},
        "encoding": {"request": {"contentType": "application/json"}},
    }
    return {
        "operationId": "recognize",
        "summary": "Names regions of an image.",
        "requestBody": {"required": True, "content": {"multipart/form-data": form}},
        "responses": {"200": _ok("Answer", ANSWER_EXAMPLE), **_refusals(STATUS.values(), 408, 415)},
    }


def _get(name: str, summary: str, schema: str, open_: bool = False) -> Json:
    operation: Json = {
        "operationId": name,
        "summary": summary,
        "responses": {"200": _ok(schema), **({} if open_ else _refusals([401, 403, 503]))},
    }
    return operation | ({"security": []} if open_ else {})


def _vocabulary() -> Json:
    words = {"schema": {"$ref": "#/components/schemas/Words"}}
    put: Json = {
        "operationId": "putVocabulary",
        "summary": "Keeps a vocabulary, in place of one of that name; its words are learnt in the "
        "background.",
        "requestBody": {"required": True, "content": {"application/json": words}},
        "responses": {
            "200": _ok("Vocabulary"),
            "201": _ok("Vocabulary"),
            **_refusals([400, 401, 403, 413, 422, 429, 500, 503], 408),
        },
    }
    delete: Json = {
        "operationId": "deleteVocabulary",
        "summary": "Forgets a vocabulary that was put.",
        "responses": {
            "204": {"description": "It is forgotten."},
            **_refusals([401, 403, 404, 422, 500, 503]),
        },
    }
    get = _get("vocabulary", "A vocabulary with its words.", "Vocabulary")
    get["responses"] |= _refusals([404])
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    return {"parameters": [name], "get": get, "put": put, "delete": delete}


def _ready() -> Json:
    operation = _get("ready", "Whether requests are answered.", "Ready", open_=True)
    operation["parameters"] = [
        {
            "name": "upstream",
            "in": "query",
            "description": "1 asks whether the model server answers, too.",
            "schema": {"enum": ["0", "1"], "default": "0"},
        }
    ]
    operation["responses"] |= _refusals([503])
    return operation


def _metrics() -> Json:
    text = {"text/plain": {"schema": {"type": "string"}}}
    return {
        "operationId": "metrics",
        "summary": "Prometheus' metrics.",
        "responses": {
            "200": {"description": "Metrics.", "content": text},
            **_refusals([401, 403]),
        },
    }


def _document() -> Json:
    content = {"application/json": {"schema": {"type": "object"}}}
    return {
        "operationId": "openapi",
        "summary": "This document.",
        "security": [],
        "responses": {"200": {"description": "OpenAPI 3.1.", "content": content}},
    }


def _ok(schema: str, example: Json | None = None) -> Json:
    content: Json = {"schema": {"$ref": f"#/components/schemas/{schema}"}}
    if example is not None:
        content["example"] = example
    return {"description": "An answer.", "content": {"application/json": content}}


def _codes() -> dict[int, list[str]]:
    """The codes of each status."""
    found: dict[int, list[str]] = defaultdict(list)
    for code, status in STATUS.items():
        found[status].append(code)
    found[408].append("TIMEOUT")
    found[415].append("REQUEST_INVALID")
    return found


def _refusals(statuses: Any, *more: int) -> Json:
    return {
        str(status): {"$ref": f"#/components/responses/Status{status}"}
        for status in sorted({*statuses, *more})
    }


def _failure(status: int, codes: list[str]) -> Json:
    meaning = "; ".join(f"{code}: {CODES[code]}" for code in codes)
    error: Json = {"schema": {"$ref": "#/components/schemas/Error"}}
    if "REGION_INVALID" in codes:
        error["example"] = ERROR_EXAMPLE
    response: Json = {"description": meaning, "content": {"application/json": error}}
    if status in _ANSWERS_WITH_RETRY_AFTER:
        seconds = {"description": "Seconds to wait.", "schema": {"type": "integer"}}
        response["headers"] = {"Retry-After": seconds}
    return response


def _schemas() -> Json:
    return {
        "Form": _object(
            {
                "request": {"$ref": "#/components/schemas/Question"},
                "image": {
                    "type": "string",
                    "contentMediaType": "application/octet-stream",
                    "description": "A JPEG, PNG or WebP file, unless the request has an "
                    "image_handle.",
                },
            },
            required=["request"],
        ),
        "Question": _question(),
        "Answer": _answer(),
        "Region": _region(),
        "Mask": _object(
            {
                "size": {"type": "array", "items": {"type": "integer"}},
                "counts": {"type": "string"},
            },
            "COCO's RLE at the image's size: height and width, compressed counts.",
        ),
        "Info": _info(),
        "Vocabularies": _object({"vocabularies": {"type": "array", "items": _LISTED}}),
        "Vocabulary": _listed({"type": "array", "items": {"type": "string"}}),
        "Words": {
            "anyOf": [
                _object({"words": {"type": "array", "items": {"type": "string"}}}),
                {"type": "array", "items": {"type": "string"}},
            ]
        },
        "Health": _object({"alive": {"const": True}}),
        "Ready": _object(
            {"ready": {"const": True}, "upstream": {"enum": ["unknown", "up", "down"]}}
        ),
        "Error": _object(
            {
                "error": _object(
                    {
                        "code": {"enum": list(CODES)},
                        "message": {"type": "string"},
                        "request_id": {"type": "string"},
                    }
                )
            }
        ),
    }


def _question() -> Json:
    points = {"type": "array", "items": _POINT}
    return {
        **_object(
            {
                "boxes": _list(_BOX, "xyxy in pixels of the upright image."),
                "points": _list(
                    {"anyOf": [_POINT, points]},
                    "For each region a point xy, or several; they follow the boxes.",
                ),
                "point_labels": _list(
                    {"anyOf": [_LABEL, {"type": "array", "items": _LABEL}]},
                    "For each point 1, foreground (the default), or 0, background.",
                ),
                "words": _list({"type": "string"}, "Class names to choose from."),
                "vocabulary": {
                    "type": ["string", "null"],
                    "description": "Instead of words, the name of a registered vocabulary.",
                },
                "top_k": {
                    "type": ["integer", "null"],
                    "minimum": 1,
                    "default": DEFAULT_TOP_K,
                    "description": "Best classes to return of each region.",
                },
                "masks": {
                    "type": ["boolean", "null"],
                    "default": False,
                    "description": "Also return a mask of each region.",
                },
                "image_handle": {
                    "type": ["string", "null"],
                    "description": "Instead of an image, the handle that an earlier answer gave.",
                },
            },
            required=[],
        ),
        "examples": [QUESTION_EXAMPLE],
    }


def _answer() -> Json:
    return _object(
        {
            "image": _object(
                {
                    "file_name": {"type": "string"},
                    "width": {"type": "integer"},
                    "height": {"type": "integer"},
                }
            ),
            "regions": {"type": "array", "items": {"$ref": "#/components/schemas/Region"}},
            "image_handle": {"type": "string"},
            "cached": {
                "type": "boolean",
                "description": "Whether the server had the image already, from the same caller.",
            },
            "model_version": {"type": "string", "description": "Which model answered."},
            "vocabulary_version": {
                "type": "string",
                "description": "Changes with the words and their order.",
            },
            "request_id": {"type": "string"},
            "took_ms": {"type": "number"},
        }
    )


def _region() -> Json:
    pair = {"type": "array", "prefixItems": [{"type": "string"}, {"type": "number"}]}
    return _object(
        {
            "box": _BOX,
            "class": {"type": "string", "description": "The best of the words."},
            "score": {"type": "number", "description": "A probability among the words."},
            "top": {"type": "array", "items": pair},
            "iou": {"type": ["number", "null"]},
            "mask": {"anyOf": [{"$ref": "#/components/schemas/Mask"}, {"type": "null"}]},
        }
    )


def _info() -> Json:
    limits = {name: {"type": "integer"} for name in [*Limits().to_json(), "max_body_bytes"]}
    return _object(
        {
            "model": {"type": "string"},
            "runtime": {"type": "string"},
            "precision": {"type": "string"},
            "model_version": {"type": "string"},
            "vocabularies": {"type": "array", "items": _LISTED},
            "limits": _object(limits),
        }
    )


def _object(
    properties: Json, description: str | None = None, required: list[str] | None = None
) -> Json:
    """A JSON object with all of its keys, or those of `required`."""
    schema: Json = {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
    }
    return schema if description is None else schema | {"description": description}


def _list(items: Json, description: str) -> Json:
    return {"type": ["array", "null"], "items": items, "description": description}


def _listed(words: Json) -> Json:
    """A vocabulary, with its words or how many they are."""
    return _object(
        {
            "name": {"type": "string"},
            "words": words,
            "version": {"type": "string"},
            "learnt": {"type": "integer", "description": "Words that the model servers know."},
        }
    )


_LISTED = _listed({"type": "integer"})

"""Class names from files of every kind that people have, or one line that names the file and says
what is wrong.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from regionspot.errors import InputError
from regionspot.vocabulary import parse_vocabulary

CATEGORIES = [
    {"id": 3, "name": "zebra", "frequency": "r"},
    {"id": 1, "name": "cat", "synonyms": ["kitty"]},
]


def written(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("words.txt", "\ufeffcat\r\n\r\n  café au lait, hot \n", ("cat", "café au lait, hot")),
        ("words.txt", "cat\rdog\r", ("cat", "dog")),
        ("coco.names", "cat\ndog\n", ("cat", "dog")),
        ("classes.TXT", "cat\ndog", ("cat", "dog")),
        ("classes", "cat\ndog", ("cat", "dog")),
        ("classes.list", '["cat", "dog"]', ("cat", "dog")),
        ("utf16.txt", "cat\r\n犬\r\n".encode("utf-16"), ("cat", "犬")),
        ("utf16be.txt", b"\xfe\xff" + "cat\n犬".encode("utf-16-be"), ("cat", "犬")),
        ("utf32.txt", "cat\n犬".encode("utf-32"), ("cat", "犬")),
        ("one.csv", 'cat\n"cup, hot"\n\n', ("cat", "cup, hot")),
        ("one.csv", "class_name\ncat,\ndog,\n", ("cat", "dog")),
        ("lvis.json", json.dumps({"images": [], "categories": CATEGORIES}), ("cat", "zebra")),
        (
            "ids.json",
            json.dumps({"categories": [{"id": "10", "name": "b"}, {"id": "9", "name": "a"}]}),
            ("a", "b"),
        ),
        (
            "ids.json",
            json.dumps({"categories": [{"id": 10.0, "name": "b"}, {"id": "9", "name": "a"}]}),
            ("a", "b"),
        ),
        (
            "ids.json",
            json.dumps({"categories": [{"id": "/m/b", "name": "b"}, {"id": "/m/a", "name": "a"}]}),
            ("a", "b"),
        ),
        ("list.json", '["cat", " dog "]', ("cat", "dog")),
        ("names.json", '{"names": {"1": "dog", "0": "cat"}}', ("cat", "dog")),
        ("data.yaml", "path: x\nnc: 2\nnames: [cat, dog]\n", ("cat", "dog")),
        ("data.yaml", "names:\n  0: cat\n  10: owl\n  2: dog\n", ("cat", "dog", "owl")),
        ("list.yml", "- cat\n- '007'\n", ("cat", "007")),
    ],
)
def test_files(tmp_path: Path, name: str, content: str | bytes, expected: tuple[str, ...]) -> None:
    assert parse_vocabulary(written(tmp_path, name, content)) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "\n\n", "the vocabulary is empty"),
        (
            "twice.txt",
            "cat\ndog\ncat\n",
            r"names 'cat' more than once: give each class once \('cat' is names 0, 2\)",
        ),
        ("latin1.txt", "café\n".encode("latin-1"), "not text in UTF-8 .*; save it as UTF-8"),
        ("odd.txt", b"\xff\xfe\x00", "not text in UTF-16"),
        ("utf16.txt", "cat\n".encode("utf-16-le"), "null characters.*save it as UTF-8"),
        (
            "photo.jpg",
            b"\xff\xd8\xff\xe0\0\x10JFIF",
            "not text in UTF-8.*What is read is a text file with a name on",
        ),
        (
            "two.csv",
            "/m/01,Tortoise\n",
            r"several columns \(\['/m/01', 'Tortoise'\]\): leave the names alone",
        ),
        ("empty.csv", "name\n", "the vocabulary is empty"),
        ("excel.csv", "id;name\n0;cat\n1;dog\n", "several columns"),
        ("tabs.csv", "id\tname\n0\tcat\n", "several columns"),
        ("line.txt", "cat, dog, bird\n", "one line with commas.*each name on its own line"),
        ("twice.json", '{"names": {"0": "cat", "1": "dog", "0": "bird"}}', "the key '0' twice"),
        ("twice.yaml", "names: {0: cat, 1: dog, 0: bird}\n", "the key 0 stands twice"),
        ("broken.json", '{"categories": ', "is not JSON"),
        ("deep.json", "[" * 100_000, "is not JSON"),
        ("null.json", "null", "lists no class names; what is read is a text file"),
        ("object.json", "{}", "lists no class names"),
        ("captions.json", '{"annotations": []}', "lists no class names"),
        ("list.json", "[]", "the vocabulary is empty"),
        (
            "mixed.json",
            '["cat", null]',
            r"names\[1\] is None, not text: write each name as text, in quotes",
        ),
        ("nested.json", '[["cat"]]', r"names\[0\] is \['cat'\], not text"),
        ("imagenet.json", '{"0": ["n01440764", "tench"]}', "lists no class names"),
        ("surrogate.json", '["\\ud800"]', "not valid Unicode"),
        ("none.json", '{"categories": []}', "the vocabulary is empty"),
        ("null.json", '{"categories": null}', "`categories` are None, not a list"),
        (
            "noname.json",
            '{"categories": [{"id": 1}]}',
            r"categories\[0\] is \{'id': 1\}, not an object with id and name",
        ),
        ("number.json", '{"categories": [5]}', r"categories\[0\] is 5"),
        (
            "nullname.json",
            '{"categories": [{"id": 4, "name": null}]}',
            "the name of category 4 is None, not text",
        ),
        (
            "listname.json",
            '{"categories": [{"id": 4, "name": ["a"]}]}',
            r"the name of category 4 is \['a'\], not text",
        ),
        (
            "blank.json",
            '{"categories": [{"id": 4, "name": " "}]}',
            "name 4 of the vocabulary is blank",
        ),
        (
            "ids.json",
            '{"categories": [{"id": 1, "name": "a"}, {"id": "x", "name": "b"}]}',
            "all be text, got 'x'|got 1",
        ),
        (
            "ids.json",
            '{"categories": [{"id": null, "name": "a"}]}',
            "whole numbers or all be text, got None",
        ),
        (
            "ids.json",
            '{"categories": [{"id": 1, "name": "a"}, {"id": "1", "name": "b"}]}',
            "hold '1' twice",
        ),
        (
            "roboflow.json",
            '{"categories": [{"id": 0, "name": "cat"}, {"id": 7, "name": "cat"}]}',
            r"names 'cat' more than once.*\('cat' is the ids 0, 7\)",
        ),
        ("data.yaml", "nc: 2\n", "lists no class names"),
        ("data.yaml", "names: [cat, yes]\n", r"names\[1\] is True, not text"),
        (
            "data.yaml",
            "names: {0: cat, x: dog}\n",
            "keys of `names` must all be whole numbers or all be text",
        ),
        ("data.yaml", "names: [cat\n", "is not YAML"),
        ("data.yaml", "? [a]\n: b\n", "is not YAML"),
        ("data.yaml", "names: 2001-99-99\n", "is not YAML"),
    ],
)
def test_files_that_cannot_be_used(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(InputError, match=message) as error:
        parse_vocabulary(path)
    assert path in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 700


def test_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("cat\ndog\n",))
    writer.start()
    assert parse_vocabulary(str(pipe)) == ("cat", "dog")
    writer.join()


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero")
def test_a_device_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regionspot.vocabulary_files.MAX_BYTES", 1000)
    with pytest.raises(
        InputError, match="/dev/zero cannot be read: it is no file, and does not end"
    ):
        parse_vocabulary("/dev/zero")


@pytest.mark.parametrize("name", ["a\0.txt", "x" * 300 + ".txt", "caf\udce9.txt", "\ud800.txt"])
def test_names_that_are_no_path(name: Any) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        parse_vocabulary(name)

"""Facts about this machine and checkout. What is read of a processor is tested in
test_doctor.py.
"""

from __future__ import annotations

import re

import numpy as np

from regionspot.provenance import git_commit, version_of


def test_the_commit_of_this_checkout() -> None:
    commit, marked = git_commit(), git_commit(mark_changes=True)
    assert commit is None or re.fullmatch(r"[0-9a-f]{40}", commit)
    assert marked is None or re.fullmatch(r"[0-9a-f]{40}(\+changes)?", marked)
    assert marked in (commit, f"{commit}+changes")


def test_versions_of_distributions() -> None:
    assert version_of("numpy") == np.__version__
    assert version_of("no-such-distribution") is None

"""Errors as data: what one process or node has met, as another one tells it."""

from __future__ import annotations

import json

import pytest

from stager import errors
from stager.errors import JOB, NODE, SITE, NoSpaceError, StagerError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("kind", [StagerError, *errors._KINDS])
def test_an_error_is_the_same_elsewhere(kind: type[StagerError]) -> None:
    error = kind("it went wrong", hint="do this", blame=NODE)
    again = errors.from_data(json.loads(json.dumps(error.as_data())))
    assert type(again) is kind
    assert vars(again) == vars(error)


def test_what_is_not_told_is_the_default() -> None:
    found = errors.from_data({"error": "it went wrong"}, blame=JOB)
    assert (type(found), found.hint, found.blame) == (StagerError, None, JOB)
    assert errors.from_data({"error": 1, "blame": "me", "code": "x"}).blame == SITE


def test_each_class_has_a_code_of_its_own() -> None:
    codes = [kind.exit_code for kind in errors._KINDS]
    assert len({*codes}) == len(codes) and StagerError.exit_code not in codes
    assert errors.from_data(NoSpaceError("full").as_data()).exit_code == 13

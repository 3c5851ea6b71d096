"""The switch that stops a request: what runs is told, what is over is left alone."""

from __future__ import annotations

import pytest

from tinyllava_edge.errors import CancelledError
from tinyllava_edge.runtimes.cancel import Cancel


def test_tells_what_runs_and_nothing_else() -> None:
    told: list[str] = []
    switch = Cancel()
    with switch.tells(lambda: told.append("early")):
        pass
    with switch.tells(lambda: told.append("now")):
        switch.check()
        switch.throw()
        with pytest.raises(CancelledError):
            switch.check()
    switch.throw()
    assert told == ["now"] and switch.thrown


def test_too_late_to_begin() -> None:
    switch = Cancel()
    switch.throw()
    with pytest.raises(CancelledError), switch.tells(lambda: None):
        pytest.fail("the block must not run")

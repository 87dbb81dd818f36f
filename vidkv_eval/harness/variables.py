"""Environment variables for the length of a block; lmms-eval's tasks take their settings from them while they load."""

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def environment_variables(**variables: str) -> Iterator[None]:
    """Set variables, and put them back as they were."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

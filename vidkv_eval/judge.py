"""The judge that scores answers: an OpenAI-compatible endpoint, started here or found elsewhere."""

import importlib
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import urlsplit

ANSWERS_WITHIN_SECONDS = 30
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class JudgeUnavailable(RuntimeError):
    """No judge answers, or another one than the settings name; nothing has been measured yet."""


@contextmanager
def judge_environment(judge: dict, environment: Mapping[str, str] = os.environ) -> Iterator[dict[str, str]]:
    """Have a judge answering inside the block.

    Args:
        judge: settings of the judge.
        environment: where the API key is looked up.
    Yields:
        The environment variables by which the tasks of lmms-eval find the judge.
    Raises:
        JudgeUnavailable: it does not answer, the key is unset, or it is not the judge of the settings.
    """
    model = judge["model"] or f"{judge['name']}-{judge['version']}"
    if judge["serve"] is not None:
        with served(judge) as url:
            yield task_environment(url, "none", model, environment)
    else:
        key = api_key(judge, environment)
        probe(judge["url"], key, model)
        yield task_environment(judge["url"], key, model, environment)


@contextmanager
def served(judge: dict) -> Iterator[str]:
    """Start the judge that the settings name and yield its address."""
    module, _, name = judge["serve"].rpartition(".")
    with getattr(importlib.import_module(module), name)() as server:
        if (server.name, server.version) != (judge["name"], judge["version"]):
            raise JudgeUnavailable(
                f"judge {judge['serve']} is {server.name} version {server.version}, the settings say {judge['name']} version "
                f"{judge['version']}; correct name and version in configs/judge, they are part of every result"
            )
        yield server.url


def api_key(judge: dict, environment: Mapping[str, str]) -> str:
    """Return the key for an endpoint."""
    variable = judge["api_key"]
    if variable is None:
        return "none"
    if not environment.get(variable):
        raise JudgeUnavailable(
            f"judge {judge['name']} at {judge['url']} needs a key in the environment variable {variable}, which is not set; "
            "set it, or judge.api_key=null for an endpoint without keys"
        )
    return environment[variable]


def probe(url: str, key: str, model: str) -> None:
    """Ask an endpoint for one short reply."""
    content = {"model": model, "messages": [{"role": "user", "content": "Reply with the word ready."}], "max_tokens": 5}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    try:
        request = urllib.request.Request(url, json.dumps(content).encode(), headers)
        with urllib.request.urlopen(request, timeout=ANSWERS_WITHIN_SECONDS) as response:
            reply = json.load(response)
        reply["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as error:
        raise JudgeUnavailable(f"the judge at {url} refuses model {model}: HTTP {error.code} {error.reason}") from error
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise JudgeUnavailable(f"the judge at {url} does not answer: {reason}; start it or set judge.url") from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise JudgeUnavailable(f"what answers at {url} is no chat-completions endpoint; judge.url must be its full address") from error


def task_environment(url: str, key: str, model: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that the tasks of lmms-eval read when they are loaded."""
    variables = {"API_TYPE": "openai", "OPENAI_API_URL": url, "OPENAI_API_KEY": key, "MODEL_VERSION": model}
    if urlsplit(url).hostname in LOOPBACK:
        direct = ",".join(filter(None, (environment.get("NO_PROXY"), *LOOPBACK)))
        variables |= {"NO_PROXY": direct, "no_proxy": direct}
    return variables

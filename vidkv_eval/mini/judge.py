"""The offline judge: a chat-completions endpoint on loopback that scores the facts of an answer.

The tasks of lmms-eval post question, reference and answer to an OpenAI-compatible endpoint and parse the reply. This one
is deterministic: it reads the three texts out of the prompt, counts the facts of the reference that the answer states
(`facts.fact_share`), and replies in the form that the prompt asks for. Its scores are not those of a GPT model and are
recorded under its own name and version.
"""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

from vidkv_eval.mini.facts import fact_share

NAME = "vidkv-facts"
VERSION = "1"
POINTS = 5
# An answer counts as right ("yes") from this many of the POINTS on.
RIGHT_FROM = 4

_CASE = re.compile(r"Question: (.*?)\nCorrect Answer: (.*?)\nPredicted Answer: (.*)\n\nProvide your evaluation", re.DOTALL)


def review(prompt: str) -> str:
    """Reply to one judging prompt.

    Args:
        prompt: the whole text of the request, system and user turns.
    Returns:
        A Python dictionary as text: {'score': 0..5}, with 'pred': 'yes' or 'no' before it where the prompt asks for both.
    Raises:
        ValueError: the prompt has another form, or its reference answer holds no fact of the mini scenes.
    """
    case = _CASE.search(prompt)
    if case is None:
        raise ValueError("not a prompt of video_dc499 or moviechat_global: no 'Question / Correct Answer / Predicted Answer' in it")
    share = fact_share(*case.groups())
    if share is None:
        raise ValueError(f"the reference answer holds no fact of the mini scenes: {case.group(2)!r}")
    score = int(POINTS * share + 0.5)
    if "'pred' and 'score'" in prompt:
        return str({"pred": "yes" if score >= RIGHT_FROM else "no", "score": score})
    return str({"score": score})


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            reply = review("\n".join(str(message["content"]) for message in request["messages"]))
        except ValueError as error:
            self._send(400, {"error": {"message": str(error), "type": "invalid_request_error"}})
            return
        message = {"role": "assistant", "content": reply}
        usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        self._send(200, {"object": "chat.completion", "model": f"{NAME}-{VERSION}", "choices": [choice], "usage": usage})

    def _send(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass  # requests are not news


class FactJudge:
    """Serves the judge on a free loopback port while a `with` block lasts.

    Attributes:
        url: full address of the chat-completions endpoint.
    """

    name, version = NAME, VERSION

    def __enter__(self) -> Self:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1/chat/completions"
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

"""
A teacher on a server that speaks OpenAI's protocol, such as vLLM: several requests at a time, tried again after
whatever may be temporary. No message of these functions holds the key or the password of the URL.
"""

import os
import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from email.utils import parsedate_to_datetime
from itertools import islice

import requests

from configurator import fail
from pretrained import load_tokenizer, note
from prompt import Prompt, chat_messages
from teacher import without_thoughts


class Complaint(Exception):
    """A reply that is no answer: its HTTP status, what it says, and for how many seconds to leave the server alone."""

    def __init__(self, status, text, seconds):
        self.status, self.text, self.seconds = status, text, seconds

    def about_the_request(self, is_chat):
        """Whether this request is refused and others may not be: it is too long, or against the server's rules. A
        server that has nothing but the chat answers 404, 405 or 501 to other paths."""
        return self.status in (400, 413, 422) or not is_chat and self.status in (404, 405, 501)

    def may_pass(self):
        return self.status >= 500 or self.status in (200, 408, 409, 425, 429)


class Refused(Exception):
    """The server has no answer to one request, and will have none."""


def seconds_to_wait(headers):
    """What a server asks for in Retry-After, as a number or as a date; 10 minutes at most."""
    value = headers.get("Retry-After", "0")
    try:
        seconds = float(value) if re.fullmatch(r"[\d.]+", value) else (
            parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        seconds = 0.0
    return min(seconds, 600.0)


class Server:
    """A chat server, asked from several threads at the same time. An option that it rejects is left out of all further
    requests."""

    def __init__(self, url, teacher, answer_tokens, connections, retries, timeout):
        """teacher: the model's name, there and, where it is known here, for its chat template."""
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not re.fullmatch("[!-~]*", key):
            fail("OPENAI_API_KEY is no key: it holds white space, or letters that no HTTP header takes")
        self.url, self.teacher, self.answer_tokens = url.rstrip("/"), teacher, answer_tokens
        self.retries, self.timeout = retries, timeout
        self.secrets = [secret for secret in (key, *re.findall("//([^/]+)@", url)) if secret]
        self.name = self.public(url)
        self.stopped = threading.Event()  # no further tries
        self.session = requests.Session()
        self.session.mount("http", requests.adapters.HTTPAdapter(pool_maxsize=connections))
        if key:
            self.session.headers["Authorization"] = f"Bearer {key}"
            self.session.auth = lambda request: request  # or requests puts what ~/.netrc has in the key's place
        # what a server may reject, by name
        self.options = dict(max_tokens=answer_tokens, temperature=0, chat_template_kwargs=dict(enable_thinking=False))
        try:  # a template without a system role wants the system line in the user's turn, as in model.py
            prompt = Prompt(load_tokenizer(teacher))
            self.system_role, self.plain = prompt.system_role, prompt.plain
        except (OSError, ValueError):
            self.system_role, self.plain = True, lambda text: text

    def public(self, text, most=300):
        """The first characters of a message, in one line, without key and password."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return " ".join(text[:most].split())

    def send(self, path, body):
        """One request, a GET without a body. Returns the reply's JSON. Raises Complaint, and what requests raises."""
        r = self.session.request("POST" if body else "GET", self.url + path, json=body, timeout=self.timeout,
                                 allow_redirects=False)
        seconds = seconds_to_wait(r.headers)
        if 300 <= r.status_code < 400:
            raise Complaint(r.status_code, f"redirects to {r.headers.get('Location', 'nowhere')}", seconds)
        if r.status_code >= 400:
            raise Complaint(r.status_code, r.text, seconds)
        reply = r.json()
        if isinstance(reply, dict) and reply.get("error"):  # gateways pack their server's error into a 200
            error = reply["error"] if isinstance(reply["error"], dict) else dict(message=reply["error"])
            status = int(code) if re.fullmatch(r"[45]\d\d", code := str(error.get("code"))) else r.status_code
            raise Complaint(status, str(error.get("message", error)), seconds)
        return reply

    def adapt(self, complaint, sent):
        """Leaves out the options that a complaint is about. Returns whether they are others now than those sent: a
        request of another thread may have met with the same complaint before."""
        if "max_completion_tokens" in complaint and self.options.pop("max_tokens", None):
            self.options["max_completion_tokens"] = self.answer_tokens
        # the word temperature alone may be the question's
        about = dict(chat_template_kwargs="chat_template_kwargs", temperature=(
            "['\"`]temperature['\"`]|(parameter|argument|property|field)( supplied)?:? temperature|"
            "temperature:? (must|is not|does not|not)"))
        for name, pattern in about.items():
            if re.search(pattern, complaint, re.IGNORECASE) and self.options.pop(name, None) is not None:
                note(f"{self.name} rejects {name}: it is left out from now on")
        return self.options.keys() != sent.keys()

    def ask(self, path, what, parse, **body):
        """parse(reply) of a request, tried again after whatever may pass: no connection, a timeout, an overloaded or
        failing server, half an answer. Raises Refused. Exits when it is no use to go on."""
        attempt = 0
        while True:
            pause, last = min(2.0 ** attempt, 60.0) * random.uniform(0.5, 1), attempt == self.retries
            options = dict(self.options)
            try:
                return parse(self.send(path, {**body, **options} if body else None))
            except Complaint as c:
                problem = f"HTTP status {c.status}: {self.public(c.text)}"
                if c.status in (200, 400, 422) and self.adapt(c.text, options):
                    continue
                # an error in a 200 may be about anything: this request is given up, when it has been tried often enough
                if c.about_the_request(is_chat=bool(body)) or last and c.status == 200:
                    raise Refused(problem) from c
                pause, last = max(pause, c.seconds), last or not c.may_pass()
            except requests.exceptions.JSONDecodeError as e:
                problem = f"not JSON: {self.public(e.doc, 100)}"
                # a page to log in, a stream: the same the next time
                last = last or e.doc.lstrip().startswith(("<", "data:"))
            except (requests.RequestException, AttributeError, LookupError, TypeError, ValueError) as e:
                problem = f"{type(e).__name__}: {self.public(str(e))}"
            if last or self.stopped.wait(pause):
                fail(f"{self.name}: no answer to {what}: {problem}; the answers so far are kept")
            attempt += 1

    def model(self):
        """The name of the model that answers. Exits when there are several and none is the teacher."""
        try:
            served = self.ask("/models", "the question which models it serves",
                              lambda reply: [m["id"] for m in reply["data"]])
        except Refused:  # not every server says
            served = [self.teacher]
        if self.teacher not in served and len(served) != 1:
            fail(f"{self.name} serves {', '.join(served) or 'no model'}, not teacher={self.teacher}")
        return self.teacher if self.teacher in served else served[0]

    def answer(self, model, id, query, documents):
        """The model's answer to a query. Raises Refused."""
        messages = chat_messages(self.plain(query), self.plain("\n\n".join(documents)), self.system_role)
        return self.ask("/chat/completions", f"the query '{id}'", self.parse_answer, model=model, messages=messages)

    def parse_answer(self, reply):
        choice = reply["choices"][0]
        message, content = choice["message"], choice["message"].get("content") or ""
        if not choice["finish_reason"]:
            raise ValueError("half an answer: no finish_reason")
        if choice["finish_reason"] == "content_filter":
            raise Refused("refused: the server's content filter has cut the answer")
        if message.get("refusal"):
            raise Refused(f"refused: {self.public(str(message['refusal']))}")
        if isinstance(content, list):  # in parts
            content = "".join(part.get("text") or "" for part in content if part.get("type", "text") == "text")
        answer = without_thoughts(content)
        if not answer and (content.strip() or message.get("reasoning_content") or message.get("reasoning")):
            raise Refused(f"it thinks and has not come to an answer within answer_tokens={self.answer_tokens}")
        # without half a surrogate pair, which no tokeniser takes
        return answer.encode(errors="ignore").decode().strip()


def ask_server(server, queries, done, record, requests_at_once):
    """Calls record({query id: answer}, model) with the answers to queries, as they come; empty ones last, to those that
    the server has refused. On an error and on Ctrl-C what is under way is waited for and recorded.

    queries: yields (id, query, [document, ..]). done: {id: {"model", ..}} of the answers that are there already. Exits
    when a request fails for good, when the first ten are refused, or when `done` is of another model.
    """
    model = server.model()
    others = {x["model"] for x in done.values()} - {model}
    if others:
        fail(f"{server.name} serves {model}, but there are answers of {others.pop()} already: start the former server "
             "again, or take --overwrite=True with another --teacher name")
    queries = (query for query in queries if query[0] not in done)
    waiting, refused, answered = {}, {}, bool(done)  # future -> query id; query id -> reason

    with ThreadPoolExecutor(requests_at_once) as pool:
        try:
            while True:
                for id, query, documents in islice(queries, 2 * requests_at_once - len(waiting)):
                    waiting[pool.submit(server.answer, model, id, query, documents)] = id
                if not answered and (len(refused) >= 10 or refused and not waiting):
                    fail(f"{server.name} refuses every request: {[*refused.values()][-1]}")
                if not waiting:
                    break
                for future in wait(waiting, return_when="FIRST_COMPLETED").done:
                    id = waiting.pop(future)
                    try:
                        record({id: future.result()}, model)
                        answered = True
                    except Refused as e:
                        refused[id] = e
        except BaseException:
            server.stopped.set()
            pool.shutdown(cancel_futures=True)
            for future, id in waiting.items():
                if not future.cancelled() and not future.exception():
                    record({id: future.result()}, model)
            raise
    if refused:
        id, reason = next(iter(refused.items()))
        print(f"{server.name} refused {len(refused):,} queries, such as '{id}': {reason}")
        record(dict.fromkeys(refused, ""), model)

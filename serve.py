"""
An OpenAI-compatible server that answers from compressed documents: vLLM's own server (`vllm serve`), in front of which
this turns the documents of a request into a compressed prompt:

    python serve.py --out_dir=out/smollm/best                     # what stands after -- is vllm serve's own
    python serve.py --out_dir=out/smollm/best -- --port=8001 --tensor-parallel-size=2

    curl localhost:8000/v1/chat/completions -H "Content-Type: application/json" -d '{"model": "scaledown",
        "messages": [{"role": "user", "content": "who wrote Emma?"}], "documents": ["Emma is a novel by Jane Austen."]}'

A request that has "documents" (strings or {"title", "text"} objects) is answered as sample.py does; /v1/completions
takes the question as its "prompt". Every other request, and all that follows (batching, streaming, sampling, errors,
API keys, a client that leaves) is vLLM's. Needs vLLM: docs/serving.md.
"""

import asyncio
import base64
import importlib.util
import io
import json
import os
import sys
import traceback

import torch

from configurator import at_least, configure, fail, fail_on, fast_dtype, torch_device
from data import is_document
from files import file_sha256, replacing_folder
from formats import check_unicode
from modes import Modes
from pretrained import decoder_layers

# -----------------------------------------------------------------------------
out_dir = "out/toy/best"  # a checkpoint
generator = ""  # where the checkpoint's generator lies now, if it has moved
compressor_model = ""  # likewise
export = ""  # a folder for the generator with its LoRA merged, made where it is missing; default: next to out_dir
store = ""  # a folder with the documents' memory (evaluate.py --compress)
keep = 0  # answer from the n most relevant documents, by the checkpoint's enable_reranking; 0 = from all
compress_batch = 32  # requests whose documents are compressed together, at most
device = "cuda" if torch.cuda.is_available() else "cpu"  # of the compressor
dtype = ""  # of the compressor and of vLLM: float32 or bfloat16; empty: whichever is faster on the device
# -----------------------------------------------------------------------------

PATHS = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}


def has_embeddings(request):
    """Whether a client sends embeddings of its own, as a prompt or as part of a message."""
    messages = request.get("messages")
    contents = [m.get("content") for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    return request.get("prompt_embeds") is not None or any(
        part.get("type") == "prompt_embeds" or "prompt_embeds" in part for part in parts)


def question(kind, request):
    """The question and the documents of a request's JSON. Raises ValueError for others than one of each."""
    documents, query = request["documents"], request.get("prompt")
    if kind == "chat":
        messages = request.get("messages")
        if not isinstance(messages, list) or len(messages) != 1 or not isinstance(messages[0], dict) or (
                messages[0].get("role") != "user"):
            raise ValueError("a request with documents has one message, the question, of role user")
        query = messages[0].get("content")
        if isinstance(query, list):  # the parts of a message
            texts = [part.get("text") if isinstance(part, dict) else None for part in query]
            query = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    if not isinstance(query, str) or not query.strip():
        raise ValueError("the question is missing, empty or no text")
    if not isinstance(documents, list) or not documents or not all(map(is_document, documents)):
        raise ValueError("documents is a list of strings or of objects with 'title' and 'text'")
    check_unicode([query, documents])
    return dict(query=query, documents=documents)


class CompressDocuments:
    """ASGI middleware of vLLM's server: puts the embeddings of a compressed prompt in the place of question and
    documents. Requests that wait at the same time are compressed together."""

    def __init__(self, app):
        self.app, self.waiting, self.worker = app, [], None
        settings = json.loads(os.environ["SCALEDOWN_SERVE"])
        self.compress_batch = settings.pop("compress_batch")
        self.modes = Modes(**{**settings, "device": "cpu"})
        model = self.modes.model
        if not getattr(model.compressor, "shares_generator", False):
            del decoder_layers(model.generator)[:]  # of the generator only the embeddings are read here
        model.to(settings["device"])
        if settings["store"]:
            self.modes.open_store(settings["store"])
        self.mode = "reranked" if "reranked" in self.modes.names else self.modes.names[0]

    async def __call__(self, scope, receive, send):
        path = scope.get("path", "")  # which may begin with a --root-path
        kind = next((kind for end, kind in PATHS.items() if path.endswith(end)), None)
        if scope["type"] != "http" or not kind:
            await self.app(scope, receive, send)
            return

        body = None

        async def receive_compressed():
            """Called where vLLM reads the request, when it has passed its own checks, such as that of the API key."""
            nonlocal body
            if body is not None:
                return await receive()
            body, more = b"", True
            while more:
                message = await receive()
                if message["type"] != "http.request":
                    return message
                body, more = body + message.get("body", b""), message.get("more_body", False)
            compressed = asyncio.ensure_future(self.compressed(kind, body))
            gone = asyncio.ensure_future(receive())  # the next message is that the client has left
            await asyncio.wait({compressed, gone}, return_when=asyncio.FIRST_COMPLETED)
            if gone.done() and not compressed.done():
                compressed.cancel()
                return gone.result()
            gone.cancel()
            return dict(type="http.request", body=compressed.result(), more_body=False)

        await self.app(scope, receive_compressed, send)

    async def compressed(self, kind, body):
        """The body of a request with documents as one with a prompt of embeddings. Raises HTTPException for a bad one;
        what is no JSON object is left to vLLM to complain of."""
        from fastapi import HTTPException

        try:
            request = json.loads(body)
        except ValueError:
            return body
        if not isinstance(request, dict):
            return body
        if has_embeddings(request):  # vLLM trusts them blindly
            raise HTTPException(400, "prompt_embeds are what this server makes of documents: send these")
        if request.get("documents") is None:
            return body
        try:
            embeds = await self.embeddings(question(kind, request))
        except ValueError as e:
            raise HTTPException(400, str(e)) from e
        except Exception as e:
            traceback.print_exc()
            raise HTTPException(500, "the documents could not be compressed: see the server's log") from e
        buffer = io.BytesIO()
        torch.save(embeds, buffer)
        data, model = base64.b64encode(buffer.getvalue()).decode(), self.modes.model
        del request["documents"]
        if kind == "chat":
            request["messages"] = [dict(role="user", content=[dict(type="prompt_embeds", data=data)])]
            request["chat_template_kwargs"] = dict(whole_prompt=True)  # see export_generator()
        else:
            request |= dict(prompt=None, prompt_embeds=data)
        if request.get("temperature") is None:
            request["temperature"] = 0
        if request.get("max_completion_tokens") is None and request.get("max_tokens") is None:
            request["max_tokens"] = model.config.answer_tokens
        more = request.get("stop_token_ids") or []
        if isinstance(more, list) and not request.get("ignore_eos"):
            request["stop_token_ids"] = [*model.stop_ids, *more]
        return json.dumps(request).encode()

    async def embeddings(self, x):
        """The prompt (P, d) of a question over its documents. Raises ValueError where it cannot be made."""
        answer = asyncio.get_running_loop().create_future()
        self.waiting.append((x, answer))
        if self.worker is None or self.worker.done():
            self.worker = asyncio.create_task(self.work())
        return await answer

    async def work(self):
        while self.waiting:
            batch = [(x, answer) for x, answer in self.waiting[:self.compress_batch] if not answer.cancelled()]
            self.waiting = self.waiting[self.compress_batch:]
            for (_, answer), prompt in zip(batch, await asyncio.to_thread(self.prompts, [x for x, _ in batch])):
                if answer.cancelled():  # its client has left
                    continue
                answer.set_exception(prompt) if isinstance(prompt, Exception) else answer.set_result(prompt)

    def prompts(self, examples):
        """The prompt of every example, or the exception that it raises: none takes the others with it."""
        try:
            queries, documents, memory = self.modes.reads(examples, self.mode)
            kind = "compressed" if self.mode == "reranked" else self.mode
            with torch.no_grad():
                x, mask = self.modes.model.embed_prompts(queries, documents, kind, memory=memory)
            return [row[real].cpu() for row, real in zip(x, mask)]
        except Exception as e:
            return [e] if len(examples) == 1 else [self.prompts([x])[0] for x in examples]


def export_generator(modes, folder):
    """Makes the folder that vLLM serves, once for each training of the checkpoint and each dtype."""
    made_of, mark = f"{file_sha256(f'{out_dir}/adapter_model.safetensors')} {modes.dtype}", f"{folder}/made_of"
    if os.path.exists(folder):
        if not os.path.exists(mark):
            fail(f"{folder} is there already, and not made by serve.py: choose another --export")
        with open(mark) as f:
            if f.read() == made_of:
                return
    # embeddings are a whole prompt, to which the chat template is to add nothing
    tokenizer = modes.model.tokenizer
    plain = (tokenizer.get_chat_template() if tokenizer.chat_template else
             "{{ raise_exception('the generator has no chat template') }}")
    tokenizer.chat_template = (
        "{% if whole_prompt %}{% set c = messages[0]['content'] %}{{ c if c is string else c[0]['text'] }}{% else %}"
        f"{plain}{{% endif %}}")
    with replacing_folder(folder) as new:
        modes.export(new)
        with open(f"{new}/made_of", "w") as f:
            f.write(made_of)
    print(f"{folder}: {modes.model.config.generator} with the LoRA of {out_dir} merged", flush=True)


def main():
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    settings = configure(globals(), sys.argv[1:end])
    at_least(settings, keep=0, compress_batch=1)
    if importlib.util.find_spec("vllm") is None:
        fail("serve.py needs vLLM: docs/serving.md tells how to install it")
    compress_batch = settings.pop("compress_batch")
    vllm_dtype = dtype or fast_dtype("cuda" if torch.cuda.is_available() else "cpu")
    settings["device"] = torch_device(device)
    settings["dtype"] = dtype or fast_dtype(settings["device"])  # the middleware loads on the CPU first
    folder = settings.pop("export") or f"{os.path.normpath(out_dir)}.generator"
    with fail_on(ValueError, OSError):
        modes = Modes(**{**settings, "device": "cpu", "dtype": vllm_dtype})
        if store:
            modes.open_store(store)
        export_generator(modes, folder)
    here = os.path.dirname(os.path.abspath(__file__))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    os.environ["SCALEDOWN_SERVE"] = json.dumps(settings | dict(compress_batch=compress_batch))
    os.execv(sys.executable, [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--dtype", vllm_dtype,
        "--served-model-name", "scaledown", "--enable-prompt-embeds", "--generation-config", "vllm", "--middleware",
        "serve.CompressDocuments", *sys.argv[end + 1:]])


if __name__ == "__main__":
    main()

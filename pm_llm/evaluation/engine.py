"""Answers by a server that speaks OpenAI's protocol: vLLM, SGLang, `transformers serve`.

It reads the same prompts (as text, where the model's tokenizer makes the same tokens of it again, else as tokens,
which vLLM and SGLang take), answers greedily, and its answers are scored as those of the model here. An adapter is
loaded by name where the server has a route for that (vLLM with VLLM_ALLOW_RUNTIME_LORA_UPDATING, SGLang); to others
the model's name is a folder of links to the base's files and the adapter's, which transformers loads as one model.
Either way the server must see this machine's folders.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from huggingface_hub import snapshot_download

from pm_llm.errors import PmLlmError, first_line
from pm_llm.evaluation.scorers import SCORERS
from pm_llm.families.models import resolve
from pm_llm.sections import EvaluationSection
from pm_llm.system.processes import on_main, process_state
from pm_llm.system.progress import say
from pm_llm.tasks.base import Example, Task
from pm_llm.tasks.encoding import Encoder

if TYPE_CHECKING:
    from openai import OpenAI

LOCAL = "http://localhost:8000/v1"
LOAD, UNLOAD = "load_lora_adapter", "unload_lora_adapter"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def check_engine(tasks: Sequence[Task], encoders: dict[str, Encoder]) -> None:
    """Raise PmLlmError if a server cannot answer for tasks: only prompts of decoders, and only by generating."""
    for task in tasks:
        if task.outside is not None or task.kind != "prompt" or SCORERS[task.scorer].lower_is_better:
            raise PmLlmError(
                f"task {task.name!r} is scored by likelihoods, which a server does not give. Score it with "
                "evaluation.engine transformers."
            )
        if encoders[task.name].family.task_type != "CAUSAL_LM":
            raise PmLlmError("evaluation.engine openai is for decoders. Use transformers for an encoder-decoder.")


class Engine:
    """What answers prompts in place of :func:`pm_llm.evaluation.generate.generate`, called as that is.

    Args:
        how: Where the server is, and how it is asked.
        model: The base model, as the server has it unless `how.served` says otherwise.
        adapter: A folder; None: the base model alone.

    Raises:
        PmLlmError: If the openai package is missing.
    """

    def __init__(self, how: EvaluationSection, model: str, adapter: Path | None) -> None:
        if importlib.util.find_spec("openai") is None:
            raise PmLlmError('evaluation.engine openai needs its client: pip install "pm_llm[openai]"')
        self.how, self.base, self.url = how, model, how.url or LOCAL
        self.adapter = None if adapter is None else adapter.resolve()
        self._links: tempfile.TemporaryDirectory[str] | None = None  # one for all tasks: servers keep what they load

    def __call__(
        self,
        model: Any,
        encoder: Encoder,
        examples: Sequence[Example],
        batch_size: int,
        batch_tokens: int = 8192,
        progress: Callable[[int], Any] | None = None,
    ) -> list[str]:
        """Each example's answer, in their order; the processes share the prompts, and every process gets all answers.

        Raises:
            PmLlmError: If the server cannot be reached, does not have the model, or gives up on a prompt.
        """
        state = process_state()
        mine = range(len(examples))[state.process_index :: state.num_processes]
        # a tokenizer is not for several threads at once
        prompts = [as_sent(encoder.tokenizer, encoder.prompt(examples[i])) for i in mine]
        with self._told() as client, self._served(client) as name:
            texts = self._texts(client, name, prompts, encoder.max_new_tokens, progress)
            answers = {i: encoder.said_text(examples[i], text) for i, text in zip(mine, texts, strict=True)}
            found = dict(pair for pair in gather_object(list(answers.items())))
        return [found[i] for i in range(len(examples))]

    def check(self) -> None:
        """Raise PmLlmError if there is no server."""
        from openai import APIStatusError

        def ask() -> None:
            with self._told() as client, suppress(APIStatusError):  # whatever it says, it is there
                client.models.list()

        on_main(ask)

    def _texts(
        self,
        client: OpenAI,
        name: str,
        prompts: Sequence[str | list[int]],
        tokens: int,
        progress: Callable[[int], Any] | None,
    ) -> list[str]:
        """The server's text to each prompt, `parallel` of them on their way at once."""

        def ask(prompt: Any) -> str:
            answer = client.completions.create(model=name, prompt=prompt, max_tokens=tokens, temperature=0.0)
            choices = getattr(answer, "choices", None)
            if not choices:
                raise PmLlmError(f"the server at {self.url} gave no completion: {str(answer)[:200]!r}.")
            if progress is not None:
                progress(1)
            return str(choices[0].text)

        with ThreadPoolExecutor(self.how.parallel) as pool:
            waiting = [pool.submit(ask, prompt) for prompt in prompts]
            try:
                return [one.result() for one in waiting]
            finally:
                for one in waiting:  # after an error nobody waits for the others
                    one.cancel()

    @contextmanager
    def _told(self) -> Iterator[OpenAI]:
        """A client, whose errors are one line."""
        from openai import OpenAI, OpenAIError

        try:
            with OpenAI(
                base_url=self.url,
                api_key=os.environ.get("OPENAI_API_KEY") or "none",
                timeout=self.how.timeout,
                max_retries=self.how.retries,
            ) as client:
                yield client
        except OpenAIError as error:
            what = self.how.served or self.base
            if self.adapter is not None:
                what += f" and a route to load {self.adapter} (vLLM: VLLM_ALLOW_RUNTIME_LORA_UPDATING), or its files"
            raise PmLlmError(
                f"the server at {self.url} did not answer ({type(error).__name__}: {first_line(error)}). Is it up, "
                f"and does it have {what}? evaluation.url and evaluation.served say where, and under which name."
            ) from error

    @contextmanager
    def _served(self, client: OpenAI) -> Iterator[str]:
        """The name under which the server has the model with the adapter; the main process sees to it."""
        if self.adapter is None:
            yield self.how.served or self.base
            return
        name, route = on_main(lambda: self._load(client))
        try:
            yield name
        finally:
            if route is not None and process_state().is_main_process:
                self._unload(client, route, name)

    def _load(self, client: OpenAI) -> tuple[str, str | None]:
        """The name of the adapter at the server, and the route where it was loaded by it."""
        assert self.adapter is not None
        content = b"".join((self.adapter / file).read_bytes() for file in ADAPTER)
        name = f"pm-llm-{sha256(content).hexdigest()[:16]}"  # never that of another adapter
        root = str(client.base_url).rstrip("/")
        for route in (f"{root}/", f"{root.removesuffix('/v1')}/"):
            if _done(client, route + LOAD, {"lora_name": name, "lora_path": str(self.adapter)}):
                return name, route
        if self._links is None:
            path = resolve(self.base)
            patterns = ["*.json", "*.safetensors", "*.model", "*.jinja"]
            base = Path(path if Path(path).is_dir() else snapshot_download(path, allow_patterns=patterns))
            self._links = tempfile.TemporaryDirectory(prefix=name)
            for file in (*base.iterdir(), *(self.adapter / file for file in ADAPTER)):
                if file.is_file() and (file.name not in ADAPTER or file.parent == self.adapter):
                    (Path(self._links.name) / file.name).symlink_to(file.resolve())
        return self._links.name, None

    def _unload(self, client: OpenAI, route: str, name: str) -> None:
        from openai import APIError

        try:
            client.post(route + UNLOAD, body={"lora_name": name}, cast_to=object)
        except APIError as error:  # the answers are there
            say(f"the server at {self.url} keeps adapter {name}: {first_line(error)}")


def as_sent(tokenizer: Any, ids: list[int]) -> str | list[int]:
    """A prompt as text that the tokenizer turns into the same tokens, or else the tokens."""
    begin = [tokenizer.bos_token_id] if ids[:1] == [tokenizer.bos_token_id] else []
    for given in (ids, ids[len(begin) :]):
        text: str = tokenizer.decode(given, clean_up_tokenization_spaces=False)
        if tokenizer(text)["input_ids"] == ids:
            return text
    return ids


def _done(client: OpenAI, route: str, body: dict[str, str]) -> bool:
    """Whether the server has a route, and did what it was told, now or before."""
    from openai import APIStatusError, BadRequestError

    try:
        client.post(route, body=body, cast_to=object)
    except BadRequestError as error:
        if "already" not in error.response.text:
            raise
    except APIStatusError as error:
        if error.status_code not in (404, 405):
            raise
        return False
    return True

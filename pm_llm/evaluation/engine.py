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
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download

from pm_llm.errors import PmLlmError, first_line
from pm_llm.evaluation.scorers import SCORERS
from pm_llm.families.models import resolve
from pm_llm.sections import EvaluationSection
from pm_llm.system.processes import on_main
from pm_llm.tasks.base import Example, Task
from pm_llm.tasks.encoding import Encoder

if TYPE_CHECKING:
    from openai import OpenAI

LOCAL = "http://localhost:8000/v1"
LOAD, UNLOAD = "load_lora_adapter", "unload_lora_adapter"


def check_engine(tasks: Sequence[Task], encoders: dict[str, Encoder]) -> None:
    """Raise PmLlmError if a server cannot answer for tasks: only prompts of decoders, and only by generating."""
    for task in tasks:
        family = encoders[task.name].family
        if task.outside is not None or task.kind != "prompt" or SCORERS[task.scorer].lower_is_better:
            raise PmLlmError(
                f"task {task.name!r} is scored by likelihoods, which a server does not give. Score it with "
                "evaluation.engine transformers."
            )
        if family.task_type != "CAUSAL_LM":
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
        self.how, self.base, self.model = how, model, how.served or model
        self.url = how.url or LOCAL
        self.adapter = None if adapter is None else adapter.resolve()

    def __call__(
        self,
        model: Any,
        encoder: Encoder,
        examples: Sequence[Example],
        batch_size: int,
        batch_tokens: int = 8192,
        progress: Callable[[int], Any] | None = None,
    ) -> list[str]:
        """Each example's answer, in their order; one process asks, and every process gets all.

        Raises:
            PmLlmError: If the server cannot be reached, does not have the model, or gives up on a prompt.
        """
        found: list[str] = on_main(partial(self._answers, encoder, examples, progress))
        return found

    def _answers(
        self, encoder: Encoder, examples: Sequence[Example], progress: Callable[[int], Any] | None
    ) -> list[str]:
        from openai import APIError, OpenAI

        how = self.how
        client = OpenAI(
            base_url=self.url,
            api_key=os.environ.get("OPENAI_API_KEY", "none"),
            timeout=how.timeout,
            max_retries=how.retries,
        )

        def ask(name: str, example: Example) -> str:
            prompt: Any = as_sent(encoder.tokenizer, encoder.prompt(example))
            answer = client.completions.create(
                model=name, prompt=prompt, max_tokens=encoder.max_new_tokens, temperature=0.0
            )
            if progress is not None:
                progress(1)
            return encoder.said_text(example, answer.choices[0].text)

        try:
            with self._served(client) as name, ThreadPoolExecutor(how.parallel) as pool:
                waiting = [pool.submit(ask, name, example) for example in examples]
                try:
                    return [one.result() for one in waiting]
                finally:
                    for one in waiting:  # after an error nobody waits for the others
                        one.cancel()
        except APIError as error:
            raise PmLlmError(
                f"the server at {self.url} did not answer ({type(error).__name__}: {first_line(error)}). Is it up, and "
                f"does it have {self.model!r}? evaluation.url and evaluation.served say where and under which name."
            ) from error

    @contextmanager
    def _served(self, client: OpenAI) -> Iterator[str]:
        """The name under which the server has the model with the adapter."""
        if self.adapter is None:
            yield self.model
            return
        weights = (self.adapter / "adapter_model.safetensors").read_bytes()
        name = f"pm-llm-{sha256(weights).hexdigest()[:16]}"  # never that of other weights
        root = str(client.base_url).rstrip("/").removesuffix("/v1")
        for place in (client.base_url, root):
            route = f"{str(place).rstrip('/')}/"
            if _told(client, route + LOAD, {"lora_name": name, "lora_path": str(self.adapter)}):
                try:
                    yield name
                finally:
                    _told(client, route + UNLOAD, {"lora_name": name})
                return
        with tempfile.TemporaryDirectory(prefix=name) as folder:
            path = resolve(self.base)
            base = Path(path if Path(path).is_dir() else snapshot_download(path))
            for file in (*base.iterdir(), *self.adapter.iterdir()):
                if file.is_file():
                    (Path(folder) / file.name).symlink_to(file.resolve())
            yield folder


def as_sent(tokenizer: Any, ids: list[int]) -> str | list[int]:
    """A prompt as text that the tokenizer turns into the same tokens, or else the tokens."""
    begin = [tokenizer.bos_token_id] if ids[:1] == [tokenizer.bos_token_id] else []
    for given in (ids, ids[len(begin) :]):
        text: str = tokenizer.decode(given, clean_up_tokenization_spaces=False)
        if tokenizer(text)["input_ids"] == ids:
            return text
    return ids


def _told(client: OpenAI, route: str, body: dict[str, str]) -> bool:
    """Whether the server has a route, and did what it was told."""
    from openai import NotFoundError

    try:
        client.post(route, body=body, cast_to=object)
    except NotFoundError:
        return False
    return True

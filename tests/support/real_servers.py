"""vLLM and llama.cpp as processes, each from the environment that has it, and models for them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

MAKE = "make servers"
CONTEXT = 128
LLAMA_CPP_CONTEXT = 256


class ServerProcess:
    """A server on a free port of 127.0.0.1, which ends with :meth:`stop`.

    ``command`` has ``{port}`` where the port belongs.
    """

    def __init__(self, command: Sequence[str], log: Path, **environment: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.command = [word.replace("{port}", str(self.port)) for word in command]
        self.log = log
        self.environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
        self.start()

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.root}/v1"

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=self.environment, start_new_session=True
            )

    def kill(self) -> None:
        """End the process and its children at once."""
        self._signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        self.kill()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)  # the group has only this process and its children

    def wait(self, seconds: float = 500.0) -> ServerProcess:
        """Wait until the server is ready."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        until = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < until:
            try:
                with opener.open(f"{self.root}/health", timeout=5):
                    return self
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        self.kill()
        pytest.fail(f"{self.command}: {self.log.read_text(errors='replace')[-3000:]}")


def interpreter(variable: str) -> str:
    """The Python of an environment with a server; skips the test if there is none."""
    if not (path := os.environ.get(variable)):
        pytest.skip(f"{variable} is not set: `{MAKE}` makes the environment, {variable} is the path of its Python")
    return str(Path(path).absolute())


def start_vllm(folder: Path, log: Path, *options: str, development: bool = True) -> ServerProcess:
    command = [interpreter("TUTELAGE_VLLM"), "-m", "vllm.entrypoints.cli.main", "serve", str(folder)]
    command += ["--host", "127.0.0.1", "--port", "{port}", "--served-model-name", "tiny", "--dtype", "float32"]
    command += ["--max-model-len", str(CONTEXT), "--max-num-seqs", "8", "--enforce-eager", *options]
    return ServerProcess(
        command, log, VLLM_SERVER_DEV_MODE=str(int(development)), VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1",
    )  # fmt: skip


def start_llama_cpp(file: Path, log: Path) -> ServerProcess:
    script = Path(__file__).with_name("llama_cpp_server.py")
    return ServerProcess(
        [interpreter("TUTELAGE_LLAMACPP"), str(script), str(file), "{port}", str(LLAMA_CPP_CONTEXT)], log
    )


def llama_folder(
    folder: Path, cutter: Any, *, layers: int = 2, hidden: int = 128, tied: bool = False, seed: int = 0
) -> Path:
    """A Llama with random weights that are large enough for distributions which are not uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(cutter), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=2 * hidden, max_position_embeddings=256, tie_word_embeddings=tied,
        bos_token_id=None, eos_token_id=cutter.eos_token_id, pad_token_id=None, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    cutter.save_pretrained(folder)
    return folder


def write_gguf(model: Any, cutter: Any, path: Path) -> Path:
    """A Llama with its byte-level tokenizer as a GGUF file in float32."""
    import json

    import gguf

    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    special, words = cutter.added_tokens_decoder, cutter.convert_ids_to_tokens(range(len(cutter)))
    merges = json.loads(cutter.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(len(words))]
    )
    writer.add_token_merges([x if isinstance(x, str) else " ".join(x) for x in merges])
    writer.add_eos_token_id(cutter.eos_token_id)
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in state.items():
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:  # llama.cpp rotates neighbours, transformers rotates halves
                rows, columns = weight.shape
                weight = weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
        writer.add_tensor(names.get_name(name, (".weight",)), weight.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

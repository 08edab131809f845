"""A llama.cpp server; run by the Python that has xllamacpp, with a GGUF file, a port and the size of the context."""

import signal
import sys

import xllamacpp

path, port, context = sys.argv[1:]
options = xllamacpp.CommonParams()
options.model.path = path
options.hostnames, options.port = ["127.0.0.1"], int(port)
options.n_ctx, options.n_parallel = int(context), 1
options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
options.warmup, options.cache_ram_mib = False, 0
server = xllamacpp.Server(options)
signal.pause()

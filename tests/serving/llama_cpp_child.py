"""The server's process, in an environment that has xllamacpp and nothing of ours."""

import json
import os
import sys

import xllamacpp

given = json.loads(sys.argv[1])
parameters = xllamacpp.CommonParams()
parameters.model.path = given["base"]
parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 0.0) for path in given["adapters"]]
parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers, parameters.warmup = 1024, 1, 0, False
parameters.cpuparams.n_threads = 1
server = xllamacpp.Server(parameters)
print("LISTENING", server.listening_address, flush=True)
sys.stdin.read()  # until the tests close it
os._exit(0)

# What README and CI call. Everything happens in .venv; `make setup` is run by the targets that need it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
STAMP  := $(VENV)/.setup-done
NATIVE := CMakeLists.txt $(wildcard regionspot/native/*)

.DEFAULT_GOAL := help
.PHONY: help setup demo test native-test docs fuzz lint export serve-demo bench gpu-check soak clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

setup: $(STAMP)  ## make .venv, install the pinned packages, build the native extension

$(STAMP): pyproject.toml constraints.txt $(NATIVE)
	@python="$(PYTHON)"; test ! -x $(BIN)/python || python=$(BIN)/python; \
	  "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' || \
	  { echo "error: $$python is not Python 3.11 to 3.14, for which the packages pinned in constraints.txt have" \
	    "releases: name another with make setup PYTHON=..., after removing $(VENV) if there is one" >&2; exit 1; }
	@echo "Setting up $(VENV): a minute or two, and about 2 GB of disk."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) scikit-build-core nanobind cmake ninja
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) --no-build-isolation -e ".[train,eval,export,openvino,tensorrt-rtx,serving,web,tracing,benchmark,peers,docs,dev]"
	@touch $@

demo: setup  ## train on the mini world, evaluate, and recognise regions in pictures: runs/demo/
	$(BIN)/python -m regionspot.cli.main demo --out runs/demo

WORKERS ?= 2

test: native-test lint  ## every check: C++, lint, types, Python, by WORKERS processes of one thread each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder

native-test: setup  ## the C++ tests, under the address and undefined-behaviour sanitizers
	$(BIN)/cmake -S . -B build/ctest -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	  -DREGIONSPOT_EXTENSION=OFF -DREGIONSPOT_SANITIZE=ON > /dev/null
	$(BIN)/cmake --build build/ctest
	$(BIN)/ctest --test-dir build/ctest --output-on-failure

docs: setup  ## the documentation site, without a warning: build/site/
	$(BIN)/python -m mkdocs build --strict

fuzz: setup  ## strange inputs through every reader, each case in a bounded process, in some minutes: runs/fuzz/
	$(BIN)/python -m tests.fuzz --workers $(WORKERS) --json runs/fuzz/robustness.json

lint: setup  ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

export: setup  ## every artefact of mini, verified, and the AP of each: runs/export/
	$(BIN)/regionspot mini build --out runs/export/data --train 1 --val 1000
	$(BIN)/regionspot-export --out runs/export/artifacts --resume --onnx --openvino --trt-rtx --precision fp32,fp16,int8
	$(BIN)/regionspot-eval --data runs/export/data/val.json --json runs/export/torch.json
	for runtime in onnxruntime openvino; do for precision in fp32 fp16 int8; do \
	  $(BIN)/regionspot-eval --data runs/export/data/val.json --artifacts runs/export/artifacts --runtime $$runtime \
	    --precision $$precision --json runs/export/$$runtime-$$precision.json || exit 1; done; done

SERVE := runs/serve
URL := 127.0.0.1:18001
WEB := http://127.0.0.1:18080

serve-demo: setup  ## a real Triton server over mini, asked by command, by Python and by the web page's API: runs/serve/
	$(BIN)/regionspot mini build --out $(SERVE)/data --train 1 --val 100
	$(BIN)/regionspot-export --out $(SERVE)/artifacts --resume --onnx --openvino
	$(BIN)/regionspot-serve init --artifacts $(SERVE)/artifacts --out $(SERVE)/model_repository
	@set -e; trap '$(BIN)/regionspot-serve down --grpc-port 18001; kill $$web' EXIT; \
	  $(BIN)/regionspot-serve up --repository $(SERVE)/model_repository --detach \
	    --http-port 18000 --grpc-port 18001 --metrics-port 18002; \
	  $(BIN)/regionspot-serve web --url $(URL) --port 18080 2> $(SERVE)/web.log & web=$$!; \
	  $(BIN)/regionspot-query $(SERVE)/data/val/000003.jpg --box 13,97,130,204 --box 138,250,195,307 --box 161,231,240,311 \
	    --vocabulary "brown toy with a black border,orange toy with a yellow bottom,cyan toy with blue dots" \
	    --url $(URL) --out $(SERVE)/overlay.png --json $(SERVE)/out.json; \
	  $(BIN)/python -m regionspot.benchmarks.serving --url $(URL) --http-url http://127.0.0.1:18000 --web-url $(WEB) \
	    --artifacts $(SERVE)/artifacts --data $(SERVE)/data/val.json --json $(SERVE)/serving.json

BENCH := runs/bench
FULL ?= regionspot_bl
FULL_GRAPHS := sam_image_encoder,clip_image_encoder,sam_token_decoder_image,sam_token_decoder_prompts,sam_mask_decoder,region_head

bench: setup  ## what each artefact costs and gains here, mini and full size beside its peers: runs/bench/report.html
	$(BIN)/regionspot mini build --out $(BENCH)/data --train 1 --val 500
	$(BIN)/regionspot mini build --out $(BENCH)/few --train 1 --val 4
	$(BIN)/regionspot-export --out $(BENCH)/mini --resume --onnx --openvino --precision fp32,int8
	$(BIN)/regionspot-export --out $(BENCH)/full --resume --onnx --openvino --precision fp32,int8 --batch 1 --parity-images 1 \
	  --model $(FULL) --random-weights 0 --graphs $(FULL_GRAPHS) --calibration $(BENCH)/few/val.json
	$(BIN)/regionspot-benchmark accuracy --artifacts $(BENCH)/mini --data $(BENCH)/data/val.json \
	  --json $(BENCH)/accuracy.json --fail-if "dAP>0.1"
	$(BIN)/regionspot-benchmark latency --artifacts $(BENCH)/mini --regions 1,10,100,300 --json $(BENCH)/latency.json
	$(BIN)/regionspot-benchmark peers --model $(FULL) --artifacts $(BENCH)/full --regions 1,10,100,300 \
	  --json $(BENCH)/peers.json
	$(BIN)/regionspot-benchmark train --json $(BENCH)/train.json
	$(BIN)/python -m regionspot.benchmarks.mask_encoding --json $(BENCH)/masks.json
	$(BIN)/regionspot-serve init --artifacts $(BENCH)/mini --precision fp32 --out $(BENCH)/model_repository
	@set -e; trap '$(BIN)/regionspot-serve down --grpc-port 18011' EXIT; \
	  $(BIN)/regionspot-serve up --repository $(BENCH)/model_repository --detach \
	    --http-port 18010 --grpc-port 18011 --metrics-port 18012; \
	  $(BIN)/regionspot-benchmark load --url 127.0.0.1:18011 --data $(BENCH)/data/val.json --json $(BENCH)/load.json
	$(BIN)/regionspot-benchmark report $(addprefix $(BENCH)/,$(addsuffix .json,latency accuracy load peers train masks)) \
	  --json $(BENCH)/report.json --html $(BENCH)/report.html --markdown $(BENCH)/report.md

MINUTES ?= 8

gpu-check: setup  ## what works on this machine's GPU and how fast, in MINUTES (8): benchmarks/results/gpu_NAME.json
	$(BIN)/python -m regionspot.benchmarks.gpu_check --resume --minutes $(MINUTES)

soak: MINUTES = 30
soak: setup  ## a server and a gateway while they are killed, starved and asked too much, for MINUTES (30): benchmarks/results/soak.json
	$(BIN)/regionspot-export --out runs/soak/artifacts --resume --onnx --openvino
	$(BIN)/python -m regionspot.benchmarks.soak --artifacts runs/soak/artifacts --minutes $(MINUTES)

clean:  ## remove what was built and run; keeps .venv
	rm -rf build dist runs .mypy_cache .pytest_cache .ruff_cache .hypothesis

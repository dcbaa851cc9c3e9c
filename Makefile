# make serve   install and serve the demo on http://127.0.0.1:8000 (HOST=... PORT=... DATA=... override)
# make test    install with the test extras and run the whole gate
HOST ?= 127.0.0.1
PORT ?= 8000
DATA ?= data
PYTHON ?= python3
BIN := .venv/bin

.PHONY: serve test test-app test-others format train-demo screenshots fuzz fuzz-decoding sbom stalls torture \
	faults-training faults-serving ray faults-ray milvus bench-training bench-generation bench-decoding bench-search \
	bench-stores bench-scaling bench-bulk bench-ray bench-sizes bench-serving bench-device clean

serve: .venv/.serve
	$(BIN)/semblance serve --demo --host $(HOST) --port $(PORT) --data $(DATA)

test: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(MAKE) --jobs 2 --output-sync=target test-app test-others

# A test that hangs says where and ends its half: the longest takes a minute.
PYTEST := $(BIN)/pytest --durations 15 -o faulthandler_timeout=400 -o faulthandler_exit_on_timeout=true

# Beside each other, each on a thread of its own: two that wait for one another are slower than one.
test-app:
	$(PYTEST) tests/app

test-others:
	$(BIN)/mypy
	$(PYTEST) tests/training
	$(PYTEST) --ignore tests/app --ignore tests/training

format: .venv/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Long checks and runs, with a short form in the suite.
train-demo: .venv/.test
	$(BIN)/semblance-train clip --preset demo
	$(BIN)/semblance-train clip --preset demo-finish
	$(BIN)/semblance-train clip --preset demo-refine
	$(BIN)/semblance-train average runs/demo/second runs/demo/third --out checkpoints/demo/clip
	$(BIN)/semblance-train clip --preset demo-finish --init checkpoints/demo/clip --lr 5e-4 --time-limit 2100 \
		--out checkpoints/demo/clip --run-dir runs/demo-last
	$(BIN)/semblance-train scenes --out checkpoints/demo/scenes.tar.gz

# The README's pictures of the page, as the tests come by them.
screenshots: .venv/.test
	SEMBLANCE_SCREENSHOTS=docs $(BIN)/pytest tests/browser

# Cases for every endpoint, in its description's terms and against them; a new seed each time, or FUZZ_SEED=.
fuzz: .venv/.test
	FUZZ_CASES=10000 FUZZ_SEED=$(or $(FUZZ_SEED),$(shell date +%s)) $(BIN)/pytest -s tests/app/test_contract.py

# Half an hour of bytes of any kind for what decodes pictures and bodies.
fuzz-decoding: .venv/.test
	$(BIN)/pip install --quiet 'atheris>=3'
	$(BIN)/python tests/fuzz_decoding.py -max_total_time=$(or $(SECONDS),1800) -rss_limit_mb=4096

# What `make serve` installs, as CycloneDX: each package with its version and licence.
sbom: .venv/.serve .venv-sbom/.done
	.venv-sbom/bin/cyclonedx-py environment --pyproject pyproject.toml --of JSON --output-file sbom.json $(BIN)/python
	@echo sbom.json

.venv-sbom/.done:
	$(PYTHON) -m venv .venv-sbom
	.venv-sbom/bin/pip install --quiet cyclonedx-bom
	touch $@

# Four hundred connections that send nothing, half a head, half a body or drops of one, and a client beside them.
stalls: .venv/.test
	STALLS=1 $(BIN)/pytest -s tests/app/test_stalls.py -k row_31

torture: .venv/.test
	KILL_ROUNDS=500 POWER_ROUNDS=100 $(BIN)/pytest -s tests/app/test_torture.py

faults-training: .venv/.test
	FAULTS=1 $(BIN)/pytest -s tests/training/test_elastic.py

faults-serving: .venv/.test
	FAULTS=1 $(BIN)/pytest -s tests/app/test_replicas.py

# Ray in an environment of its own: the suite's would be half as large again with it.
ray: .venv-ray/.done
	.venv-ray/bin/pytest tests/app/test_bulk.py tests/app/test_ray_serve.py

faults-ray: .venv-ray/.done
	FAULTS=1 .venv-ray/bin/pytest -s tests/app/test_ray_serve.py tests/app/test_bulk.py -k 'host or more_replicas'

bench-ray: .venv-ray/.done
	.venv-ray/bin/python tests/benchmarks/bench_ray_serve.py

.venv-ray/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-ray
	.venv-ray/bin/pip install --quiet --constraint constraints.txt --editable .[cpu,ray] pytest
	touch $@

# A whole server of Milvus beside milvus-lite, which is the suite's; its last package is of Linux and 2.3.
milvus: .venv/.test .venv-milvus/.done
	MILVUS_SERVER=.venv-milvus/bin/python $(BIN)/pytest -s --durations 15 tests/app/test_milvus.py tests/app/test_store.py \
		tests/app/test_torture.py -k milvus

.venv-milvus/.done:
	$(PYTHON) -m venv .venv-milvus
	.venv-milvus/bin/pip install --quiet milvus==2.3.5
	touch $@

# In an environment of its own, so that what is compared with is never among what is served or trained with.
bench-training: .venv-bench/.done
	.venv-bench/bin/python tests/benchmarks/bench_training.py

bench-decoding: .venv/.test
	$(BIN)/python tests/benchmarks/bench_decoding.py

bench-search: .venv/.test
	$(BIN)/python tests/benchmarks/bench_search.py

# Training by one process and by two.
bench-scaling: .venv/.test
	$(BIN)/python tests/benchmarks/bench_scaling.py

# SQLite, PostgreSQL and Milvus beside each other.
bench-stores: .venv/.test
	$(BIN)/python tests/benchmarks/bench_stores.py

# What collections take: disk, memory, and seconds until a killed server is ready again.
bench-bulk: .venv/.test
	$(BIN)/python tests/benchmarks/bench_bulk.py

bench-sizes: .venv/.test
	$(BIN)/python tests/benchmarks/bench_sizes.py

# Each peer in an environment of its own.
bench-serving: .venv/.test .venv-infinity/.done .venv-clip-as-service/.done
	$(BIN)/python tests/benchmarks/bench_serving.py

# What one GPU does; needs one.
bench-device: .venv/.test
	$(BIN)/python tests/benchmarks/bench_device.py

bench-generation: .venv-bench/.done .venv-dalle-pytorch/.done
	.venv-bench/bin/python tests/benchmarks/bench_generation.py

.venv-bench/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet --constraint constraints.txt --editable . lightly transformers
	touch $@

# Its tokenizer and its lightning are of a time before isolated builds and lightning 2.
.venv-dalle-pytorch/.done:
	$(PYTHON) -m venv .venv-dalle-pytorch
	.venv-dalle-pytorch/bin/pip install --quiet 'cython<3' 'setuptools<81' wheel
	.venv-dalle-pytorch/bin/pip install --quiet --no-build-isolation youtokentome
	.venv-dalle-pytorch/bin/pip install --quiet dalle-pytorch==1.6.6 pytorch-lightning==1.8.6 'torch>=2.11,<2.14' \
		'setuptools<81'
	touch $@

.venv-infinity/.done:
	$(PYTHON) -m venv .venv-infinity
	.venv-infinity/bin/pip install --quiet 'torch>=2.11,<2.14' 'infinity-emb[server,torch,vision]==0.0.78' aiohttp
	touch $@

.venv-clip-as-service/.done: tests/benchmarks/clip-as-service.txt
	$(PYTHON) -m venv .venv-clip-as-service
	.venv-clip-as-service/bin/pip install --quiet --constraint $< 'torch>=2.11,<2.14' torchvision clip-server
	touch $@

.venv/.serve: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cpu]'
	touch $@

.venv/.test: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-bench .venv-ray .venv-milvus .venv-infinity .venv-clip-as-service .venv-dalle-pytorch build *.egg-info \
		.mypy_cache .ruff_cache .pytest_cache .import_linter_cache

# Everything runs inside .venv, which the first target that needs it sets up.
# PYTHON=/path/to/python3.12 chooses the interpreter that .venv is made from.

MODEL   = models/lenet-5.onnx
PASSES  = fold,prune:sparsity=0.95
DATA    = models/mnist.npz:image=train_x/255,labels=train_y
EVAL    = models/mnist.npz:image=test_x/255,labels=test_y
OUT     = out/lenet-5.onnx

.PHONY: help demo test slow lint check bench clean

help:
	@echo 'make demo    set up, then shrink a real model on real data'
	@echo 'make test    set up, then run the tests'
	@echo 'make slow    set up, then run the tests that take long'
	@echo 'make lint    set up, then ruff and mypy'
	@echo 'make check   set up, then ruff, mypy and the tests'
	@echo 'make bench   set up, then run the benchmark NAME=... (none: list them)'
	@echo 'make clean   remove .venv, caches and out/'

demo:
	@tools/venv
	@mkdir -p $(dir $(OUT))
	.venv/bin/onnxshrink $(MODEL) --passes $(PASSES) --data $(DATA) \
	    --eval $(EVAL) --max-drop 0.1 -o $(OUT)

test:
	@tools/venv test
	.venv/bin/pytest

slow:
	@tools/venv test
	.venv/bin/pytest -m slow

lint:
	@tools/venv dev
	@tools/check lint

check:
	@tools/venv dev
	@tools/check

bench:
	@tools/venv test
	.venv/bin/python tools/bench $(NAME)

clean:
	rm -rf .venv out build dist *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

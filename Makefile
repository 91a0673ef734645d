# `make demo` and `make test` install everything they need into a virtual environment of their own.
PYTHON ?= python3
VENV ?= .venv

.PHONY: demo test newest docs dist clean

demo: $(VENV)/installed
	mkdir -p demo
	$(VENV)/bin/stablevsr upscale stablevsr/assets/demo.mp4 demo/demo_x4.mp4 \
		--side-by-side demo/side_by_side.mp4 --force
	@echo "Input: stablevsr/assets/demo.mp4 (80x60). Result: demo/demo_x4.mp4 (320x240)."
	@echo "To compare: demo/side_by_side.mp4, bicubic interpolation on the left, the result on the right."

# Includes style and types, so that the one command that CI runs checks them too; first, because they take seconds.
test: $(VENV)/installed-test
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m mypy
	$(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# The manual, in site/. It opens from disk; its search needs a server: python3 -m http.server -d site
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build

# A wheel and an sdist, in dist/.
dist: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --disable-pip-version-check build
	$(VENV)/bin/python -m build

# The tests on the newest release of every dependency, beyond the bounds in setup.cfg: shows upcoming breakage early.
newest:
	rm -rf $(VENV)-newest
	$(MAKE) $(VENV)-newest/installed-test VENV=$(VENV)-newest
	$(VENV)-newest/bin/pip install --quiet --disable-pip-version-check --upgrade $$($(VENV)-newest/bin/python -c \
		"import importlib.metadata as m, re; print(*{re.match(r'[\w.-]+', r)[0] for r in m.requires('stablevsr')})")
	$(VENV)-newest/bin/python -m pytest

$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/installed-test: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e '.[test]'
# The comparison page is tested in a browser: installed where that needs no password, else these tests are skipped.
	@command -v chromium google-chrome >/dev/null || [ "$$(id -u)" != 0 ] || \
		(timeout 60 apt-get update && timeout 180 apt-get install -y chromium) >/dev/null 2>&1 || true
	touch $@

$(VENV)/installed-docs: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-newest demo site dist build

# Needs Rust and make. `deps` and `test-deps` install what else is missing, and do nothing otherwise.

CARGO ?= cargo
SUDO := $(shell [ "$$(id -u)" = 0 ] || command -v sudo)

.PHONY: demo test bench lint deps test-deps

demo: deps
	$(CARGO) run --quiet -- demo --visitors 20

test: deps test-deps
	$(CARGO) test

bench: deps test-deps
	$(CARGO) bench --bench decide --bench rules --bench limits --bench seeing
	$(CARGO) build --profile bench --example bare
	$(CARGO) bench --bench load --bench cache --bench connections

lint:
	$(CARGO) fmt --check
	$(CARGO) clippy --all-targets -- -D warnings
	$(CARGO) test --test architecture

# What the build needs beside Rust: cmake and a C compiler (zlib-ng, ring and zstd are C).
deps:
	@if command -v cmake >/dev/null && command -v cc >/dev/null; then exit 0; fi; \
	echo "installing cmake and a C compiler"; \
	if command -v apt-get >/dev/null; then $(SUDO) apt-get update -qq && $(SUDO) apt-get install -qq -y cmake gcc g++ libc6-dev >/dev/null; \
	elif command -v dnf >/dev/null; then $(SUDO) dnf install -q -y cmake gcc gcc-c++; \
	elif command -v apk >/dev/null; then $(SUDO) apk add -q cmake build-base; \
	elif command -v brew >/dev/null; then brew install -q cmake; \
	else echo "install cmake and a C compiler, then try again" >&2; exit 1; fi

# The servers that tests and benches start: origins, yardsticks and Redis; `ip` for network namespaces; Prometheus with
# promtool; a browser and what drives it; a collector for traces.
test-deps: tests/page/node_modules target/rotel/rotel/rotel-agent
	@if command -v nginx >/dev/null && command -v node >/dev/null && command -v wrk >/dev/null && command -v ip >/dev/null && command -v chromium >/dev/null && command -v redis-server >/dev/null && command -v promtool >/dev/null && { ! command -v apt-get >/dev/null || { command -v pebble && /usr/bin/python3 -c "import grpc"; } >/dev/null 2>&1; }; then exit 0; fi; \
	echo "installing nginx, node, wrk, redis, ip, prometheus and chromium for the tests and benches"; \
	if command -v apt-get >/dev/null; then $(SUDO) apt-get update -qq && \
		$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends nginx-light libnginx-mod-http-geoip2 nodejs wrk redis-server iproute2 chromium mount pebble python3-grpcio prometheus >/dev/null; \
	elif command -v dnf >/dev/null; then $(SUDO) dnf install -q -y nginx nodejs redis iproute chromium golang-github-prometheus; \
	elif command -v apk >/dev/null; then $(SUDO) apk add -q nginx nginx-mod-http-geoip2 nodejs wrk redis iproute2 chromium prometheus; \
	elif command -v brew >/dev/null; then brew install -q nginx node wrk redis prometheus; \
	else echo "install nginx, node and prometheus, then try again" >&2; exit 1; fi

# Playwright and axe, which the test of the page drives Chromium with.
tests/page/node_modules: tests/page/package-lock.json
	@command -v npm >/dev/null || { command -v apt-get >/dev/null && $(SUDO) apt-get update -qq && $(SUDO) apt-get install -qq -y --no-install-recommends npm >/dev/null; }
	@npm ci --silent --no-audit --no-fund --prefix tests/page && touch $@

# A collector that speaks OTLP.
target/rotel/rotel/rotel-agent:
	@python3 -m pip --version >/dev/null 2>&1 || { command -v apt-get >/dev/null && $(SUDO) apt-get update -qq && $(SUDO) apt-get install -qq -y --no-install-recommends python3-pip >/dev/null; }
	@python3 -m pip install --quiet --no-deps --disable-pip-version-check --target target/rotel rotel==0.0.1a15
	@chmod +x $@

# Needs Rust and make. `deps` and `test-deps` install what else is missing, and do nothing otherwise.

CARGO ?= cargo
SUDO := $(shell [ "$$(id -u)" = 0 ] || command -v sudo)

.PHONY: demo test bench lint deps test-deps

demo: deps
	$(CARGO) run --quiet -- demo --visitors 20

test: deps test-deps
	$(CARGO) test

bench: deps test-deps
	$(CARGO) bench --bench decide --bench rules --bench limits
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

# The servers that tests and benches start: origins, yardsticks and Redis; `ip` for network namespaces; a browser.
test-deps:
	@if command -v nginx >/dev/null && command -v node >/dev/null && command -v wrk >/dev/null && command -v ip >/dev/null && command -v chromium >/dev/null && command -v redis-server >/dev/null && { ! command -v apt-get >/dev/null || { command -v pebble && /usr/bin/python3 -c "import grpc"; } >/dev/null 2>&1; }; then exit 0; fi; \
	echo "installing nginx, node, wrk, redis, ip and chromium for the tests and benches"; \
	if command -v apt-get >/dev/null; then $(SUDO) apt-get update -qq && \
		$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y nginx-light libnginx-mod-http-geoip2 nodejs wrk redis-server iproute2 chromium mount pebble python3-grpcio >/dev/null; \
	elif command -v dnf >/dev/null; then $(SUDO) dnf install -q -y nginx nodejs redis iproute chromium; \
	elif command -v apk >/dev/null; then $(SUDO) apk add -q nginx nginx-mod-http-geoip2 nodejs wrk redis iproute2 chromium; \
	elif command -v brew >/dev/null; then brew install -q nginx node wrk redis; \
	else echo "install nginx and node, then try again" >&2; exit 1; fi

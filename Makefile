# `make run` and `make test` need nothing but a Rust toolchain.

CARGO ?= cargo --locked

.PHONY: run demo test test-sigterm lint proto build bench clean

# The relay, in test mode unless there is a .env.
run:
	@if [ -f .env ]; then $(CARGO) run; else \
		echo "no .env: starting in test mode, which needs no key"; TEST_MODE=true $(CARGO) run; fi

# Relay, sandbox and a sender together; about ten seconds after the build.
demo:
	$(CARGO) build --bin analytics-relay --example demo
	$(CARGO) run --quiet --example demo

# Every test.
test:
	$(CARGO) test --workspace

# SIGTERM at 200 random moments under load, providers up and down.
# RELAY_SEED=<number> repeats a run.
test-sigterm:
	RELAY_SIGTERM_RUNS=200 $(CARGO) test --test relay sigterm_at_any_moment -- --nocapture

# Formatting, lints, documentation; licences and bans where cargo-deny is there.
lint:
	cargo fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --document-private-items
	@if command -v cargo-deny >/dev/null; then cargo deny --offline check bans licenses sources; \
		else echo "cargo-deny is not installed: licences and bans are not checked"; fi

# Compiles the proto files again; no protoc is needed.
proto:
	touch build.rs
	$(CARGO) check

build:
	$(CARGO) build --release

# The pure parts one by one, then the whole relay under load.
bench:
	$(CARGO) bench --bench pure
	$(CARGO) bench --bench relay

clean:
	cargo clean

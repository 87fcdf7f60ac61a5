# `make run` and `make test` need nothing but a Rust toolchain.

CARGO ?= cargo --locked
# Where tests note what the machine lacks.
NOT_RUN := $(CURDIR)/target/not-run

.PHONY: run demo demo-crash test test-sigterm test-isolation test-power-cut test-durability coverage prove fuzz lint proto build bench bench-check bench-record bench-pure bench-durable bench-store bench-store-peers bench-store-move bots clean

# The relay, in test mode unless there is a .env.
run:
	@if [ -f .env ]; then $(CARGO) run; else \
		echo "no .env: starting in test mode, which needs no key"; TEST_MODE=true $(CARGO) run; fi

# Relay, sandbox and a sender together; about ten seconds after the build.
demo:
	$(CARGO) build --bin analytics-relay --example demo
	$(CARGO) run --quiet --example demo

# The relay is killed with SIGKILL under load and started again.
demo-crash:
	$(CARGO) build --bin analytics-relay --example demo
	$(CARGO) run --quiet --example demo -- crash

# Every test that leaves the machine as it is. Ends with what was not run and why;
# RELAY_REQUIRE=all makes that a failure. (docs/testing.md)
test:
	@mkdir -p target; rm -f $(NOT_RUN); result=0; \
	RELAY_NOT_RUN_LIST=$(NOT_RUN) $(CARGO) test --workspace || result=$$?; \
	if [ -s $(NOT_RUN) ]; then echo; sort -u $(NOT_RUN); fi; exit $$result

# SIGTERM at 200 random moments under load, providers up and down.
# RELAY_SEED=<number> repeats a run.
test-sigterm:
	RELAY_SIGTERM_RUNS=200 $(CARGO) test --test relay sigterm_at_any_moment -- --nocapture

# One slow provider moves callers and the other providers by 10 % at most. A minute after
# the build, on a machine that does nothing else.
test-isolation:
	$(CARGO) bench --bench suite -- isolation --check

# Cuts the power of a file system in an image, with a store and without: needs root and
# a loop device, which it gives back.
test-power-cut:
	RELAY_REQUIRE=all $(CARGO) test --test durability power_fails -- --ignored --nocapture

# A million simulated schedules of the log; then, on the relay as a process, 1,000
# SIGKILLs and as many of one with a store, a SIGKILL before and an error at every storage
# call, 200 power cuts and 50 of one with a store, full disks, half an hour without a
# provider; an error at every storage call of a store: two hours. Needs root, strace and loop devices, and fails where it lacks one.
# RELAY_SEED=<number> repeats a run; the short form is in `test`.
test-durability:
	RELAY_SEED=$${RELAY_SEED:-$$(date +%s)} RELAY_SPOOL_SCHEDULES=1000000 \
		$(CARGO) test --release --lib queue::spool -- --nocapture
	RELAY_REQUIRE=all RELAY_LONG=1 RELAY_KILL_RUNS=1000 RELAY_POWER_CUTS=200 RELAY_STORE_POWER_CUTS=50 \
		RELAY_OUTAGE_SECONDS=1800 \
		$(CARGO) test --test durability -- --include-ignored --nocapture --test-threads 1
	RELAY_REQUIRE=all RELAY_LONG=1 \
		$(CARGO) test -p analytics-relay-store --lib sqlite::tests::faults -- --nocapture

# Which lines the tests run, those in a relay that they start as a process among
# them. Fails below 80 % over all and 95 % of the log, delivery and shutdown; what
# is not run is named in target/coverage/missed.
coverage:
	@cargo tarpaulin --version >/dev/null 2>&1 || \
		{ echo "cargo-tarpaulin is not installed: cargo install --locked cargo-tarpaulin"; exit 1; }
	cargo tarpaulin --locked --workspace --engine llvm --follow-exec --skip-clean --timeout 1800 \
		--target-dir target/coverage --output-dir target/coverage --out Lcov \
		--exclude-files 'benches/*' 'examples/*' 'fuzz/*' 'target/*' 'tests/*' 'providers/tests/*'
	sh .ci/coverage target/coverage/lcov.info

# All that proves the durable mode, with its figures. Some hours.
prove: test-durability fuzz bench-durable

# Every fuzz target for FUZZ_SECONDS, one after another. What they find is kept
# in fuzz/artifacts, what they learn in fuzz/corpus.
FUZZ_SECONDS ?= 600
# `none` is about twice as fast, and nothing here is unsafe.
FUZZ_SANITIZER ?= address
FUZZ_TARGETS ?= $(sort $(notdir $(basename $(wildcard fuzz/fuzz_targets/*.rs))))

fuzz:
	@cargo +nightly --version >/dev/null 2>&1 || \
		{ echo "no nightly toolchain: rustup toolchain install nightly"; exit 1; }
	@cargo +nightly fuzz --version >/dev/null 2>&1 || \
		{ echo "cargo-fuzz is not installed: cargo install --locked cargo-fuzz"; exit 1; }
	cargo +nightly fuzz build --sanitizer $(FUZZ_SANITIZER)
	@mkdir -p fuzz/target/logs; : >fuzz/target/logs/table; failed=0; \
	for target in $(FUZZ_TARGETS); do \
		echo "$$target: $(FUZZ_SECONDS) seconds"; \
		mkdir -p fuzz/corpus/$$target fuzz/seeds/$$target; result=ok; log=fuzz/target/logs/$$target; \
		cargo +nightly fuzz run --sanitizer $(FUZZ_SANITIZER) $$target \
			fuzz/corpus/$$target fuzz/seeds/$$target -- \
			-max_total_time=$(FUZZ_SECONDS) -timeout=25 -max_len=16384 -print_final_stats=1 \
			>$$log 2>&1 || { result=FAILED; failed=1; tail -n 40 $$log; }; \
		runs=$$(sed -n 's/^stat::number_of_executed_units: *//p' $$log); \
		printf '%-16s %12s  %s\n' $$target "$${runs:-?}" $$result >>fuzz/target/logs/table; \
	done; \
	printf '\n%-16s %12s\n' target executions; cat fuzz/target/logs/table; exit $$failed

# Formatting, lints, documentation, what only fuzzing compiles; licences and bans where
# cargo-deny is there.
lint:
	cargo fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --document-private-items
	RUSTFLAGS="--cfg fuzzing -A dead_code" $(CARGO) check --workspace --target-dir target/fuzzing
	@if command -v cargo-deny >/dev/null; then cargo deny --offline check bans licenses sources; \
		else echo "cargo-deny is not installed: licences and bans are not checked"; fi

# Compiles the proto files again; no protoc is needed.
proto:
	touch build.rs
	$(CARGO) check

build:
	$(CARGO) build --release

# Every figure of the whole relay beside its floor, about a quarter of an hour
# after the build; BENCH="memory latency" runs two groups of it. What is not on the
# machine (valgrind, h2load, Python, Node) is left out and named.
bench:
	$(CARGO) bench --bench suite -- $(BENCH)

# Instructions and allocations per event: fails when one is over 3 % above the
# recorded baseline. `-record` makes a whole run the baseline.
bench-check:
	$(CARGO) bench --bench suite -- instructions http_instructions --check
bench-record:
	$(CARGO) bench --bench suite -- $(BENCH) --record

# The pure parts, one by one.
bench-pure:
	$(CARGO) bench --bench pure

# What durability costs beside the disk's own rate; a backlog of 1 GB. Some
# minutes.
bench-durable:
	$(CARGO) bench --bench durable

# The store: what appending and questions cost on one core, then questions while events
# come in on all. Of so many million events; the store that is made for it is kept in
# target/store-bench and used again.
MILLIONS ?= 1
STORE_BENCH := STORE_BENCH_DIR=$(CURDIR)/target/store-bench
STORE_BENCH_RUN := $(CARGO) bench -p analytics-relay-store --bench store -- $(MILLIONS)

bench-store:
	@mkdir -p target/store-bench
	$(CARGO) bench -p analytics-relay-store --bench store --no-run
	$(STORE_BENCH) taskset -c 0 $(STORE_BENCH_RUN)
	$(STORE_BENCH) $(STORE_BENCH_RUN) live

# The same events and questions in PostgreSQL, DuckDB and chDB, in one table. Needs Python
# and PyPI; what is not there is left out and named.
bench-store-peers:
	@mkdir -p target/store-bench; rm -rf target/store-bench/store-bench-$(MILLIONS).*
	$(CARGO) bench -p analytics-relay-store --bench store --no-run
	$(STORE_BENCH) taskset -c 0 $(STORE_BENCH_RUN)
	$(STORE_BENCH) taskset -c 0 $(STORE_BENCH_RUN) peers
	python3 store/benches/peers target/store-bench $(MILLIONS)

# `store export | store import` of the relay, and whether the answers stay the same.
bench-store-move:
	@mkdir -p target/store-bench
	$(CARGO) build --release
	RELAY_BIN=$(CURDIR)/target/release/analytics-relay $(STORE_BENCH) $(STORE_BENCH_RUN) move

# What the table of bots (src/enrich/data/bots.tsv) lacks of the newest
# crawler-user-agents of npm: to be looked up and entered by hand, not copied. Needs Node.
bots:
	npm install --no-save --no-audit --no-fund --prefix target/bots crawler-user-agents@latest user-agents@latest
	RELAY_REQUIRE=all RELAY_AGENT_LISTS=$(CURDIR)/target/bots $(CARGO) test --test relay agents:: -- --nocapture

clean:
	cargo clean

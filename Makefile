# blksnap. `make` alone lists what can be made.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PREFIX ?= /usr/local
DESTDIR ?=

# The version is the newest one in the change log; a build that is not exactly
# that release says which commit it was made from.
RELEASE := $(shell sed -n 's/^## \[\([0-9][^]]*\)\].*/\1/p' CHANGELOG.md | head -n 1)
COMMIT  := $(shell [ "$$(git describe --tags --exact-match 2>/dev/null)" = v$(RELEASE) ] || \
                   git rev-parse --short HEAD 2>/dev/null)
VERSION := $(RELEASE)$(if $(COMMIT),+g$(COMMIT))

STATICCHECK := go run honnef.co/go/tools/cmd/staticcheck@v0.8.2

# The programs that each target needs beyond Go; test/require.sh knows their
# packages.
DEMO_NEEDS  := nbdfuse losetup mkfs.ext4 e2fsck fusermount3
TEST_NEEDS  := $(DEMO_NEEDS) gcc git mkfs.xfs mkfs.btrfs qemu-img nbdinfo nbdcopy file nbdkit fio rsync \
               groff nbd-client qemu-system-x86_64 unxz python3 /usr/lib/python3/dist-packages/nbd.py shellcheck
BENCH_NEEDS := $(DEMO_NEEDS) fio nbdkit nbdcopy qemu-nbd qemu-storage-daemon

# How long make fuzz tries each target: a number of inputs, which take about ten
# seconds. A duration does as well, but now and then Go calls its end a failure.
FUZZ ?= 40000x

# Prints each test with its time, all that a failing one says, and at the end
# how many there were.
SHOW_TESTS := awk '/^=== (RUN|PAUSE|CONT|NAME)/ {next} \
	/^ *--- PASS/ {p++} /^ *--- SKIP/ {s++} /^ *--- FAIL/ {f++} {print; fflush()} \
	END {printf "%d tests passed, %d skipped, %d failed\n", p, s, f}'

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

.PHONY: build
build: ## build ./blksnap, a static binary
	CGO_ENABLED=0 go build -trimpath -ldflags '-X main.version=$(VERSION)' -o blksnap .

.PHONY: demo
demo: ## show a whole backup, step by step, on a disk image of its own (root)
	@test/require.sh $(DEMO_NEEDS)
	@$(MAKE) --no-print-directory build
	test/demo.sh ./blksnap

.PHONY: test
test: ## run every test (root)
	@test/require.sh $(TEST_NEEDS)
	@$(MAKE) --no-print-directory lint
	@echo "go test -race, package by package"
	@go test -race -count=1 -v $$(go list ./... | grep -v '^blksnap/test') 2>&1 | $(SHOW_TESTS)
	@echo "go test, what the race detector hides"
	@go test -count=1 -v -run 'NoAllocation|FaultInAFold|MemoryFaults' ./intercept ./cow 2>&1 | $(SHOW_TESTS)
	@$(MAKE) --no-print-directory fuzz
	@echo "go test -race ./test/..., the whole program"
	@go test -race -count=1 -v -timeout 30m ./test/... 2>&1 | $(SHOW_TESTS)
	@echo "go test, 200 kills of the whole program"
	@go test -count=1 -v -run KilledUnderLoad ./test 2>&1 | $(SHOW_TESTS)
	@test/demo.sh ./blksnap > /dev/null
	@echo "the demo passed"

.PHONY: lint
lint: build ## check format and common mistakes
	@test -z "$$(gofmt -l .)" || { echo "not formatted:"; gofmt -l .; exit 1; }
	go vet ./...
	$(STATICCHECK) ./...
	@if command -v shellcheck > /dev/null; then shellcheck .ci/run docs/*.sh test/*.sh test/vm/*.sh; \
	 else echo "shellcheck is not installed: the scripts were not checked"; fi

.PHONY: fuzz
fuzz: ## say random things to the NBD server (FUZZ=5m)
	@for target in FuzzHandshake FuzzTransmission; do \
		echo "go test -fuzz $$target -fuzztime $(FUZZ)"; \
		go test -run '^$$' -fuzz "^$$target$$" -fuzztime $(FUZZ) -fuzzminimizetime 20x ./intercept; \
	done

.PHONY: bench
bench: ## measure side by side with nbdkit and QEMU (root; BENCH='-rows ... -runs 5')
	@test/require.sh $(BENCH_NEEDS)
	@$(MAKE) --no-print-directory build
	go run ./test/bench -blksnap ./blksnap $(BENCH)

.PHONY: install
install: build ## install binary and manual page below $(DESTDIR)$(PREFIX)
	install -D -m 755 blksnap $(DESTDIR)$(PREFIX)/bin/blksnap
	install -D -m 644 docs/blksnap.8 $(DESTDIR)$(PREFIX)/share/man/man8/blksnap.8

.PHONY: uninstall
uninstall: ## remove what install put there
	rm -f $(DESTDIR)$(PREFIX)/bin/blksnap $(DESTDIR)$(PREFIX)/share/man/man8/blksnap.8

.PHONY: clean
clean: ## remove what was built
	rm -rf blksnap test/vm/build

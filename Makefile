# SPDX-License-Identifier: GPL-2.0-or-later
# What can be done with this tree. Everything that is built goes to build/ or to ~/.cache/cpr-agent.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

CACHE := $(or $(CPR_AGENT_CACHE),$(HOME)/.cache/cpr-agent)
VENV = $(shell scripts/bootstrap --venv-path)
PYTHON = $(VENV)/bin/python
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' agent/cpr_agent/__init__.py)
DEB := build/cpr-agent_$(VERSION)_all.deb
RPM := build/cpr-agent-$(VERSION)-1.noarch.rpm
PAGE_DEB := build/cockpit-cpr-agent_$(VERSION)_all.deb
PAGE_RPM := build/cockpit-cpr-agent-$(VERSION)-1.noarch.rpm
SOURCES = $(shell git ls-files --cached --others --exclude-standard agent units policies packaging docs Makefile NEWS.md COPYING 2>/dev/null)
PAGE_SOURCES = $(shell git ls-files --cached --others --exclude-standard cockpit)
MAN_PAGES := $(patsubst packaging/man/%.scd,build/man/%,$(wildcard packaging/man/*.scd)) build/man/org.cpragent1.5

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{ printf "make %-14s %s\n", $$1, $$2 }'

.PHONY: bootstrap
bootstrap: ## Install what building and testing need (apt packages, a venv in the cache)
	@scripts/bootstrap

.PHONY: check
check: bootstrap ## Lint and type-check everything; the unit tests, and how much of core they run
	scripts/check $(VENV)
	scripts/coverage $(VENV)

.PHONY: test-unit
test-unit: bootstrap ## Unit tests alone
	$(PYTHON) -m pytest --numprocesses=auto --dist=worksteal tests/unit

# All of them with each library (ADR 28). With one alone: make test-bus LIBRARIES=dbus_next
LIBRARIES := dbus_fast dbus_next
BUS_TESTS := tests/bus $(wildcard tests/unit/test_bus_*.py)
dbus_next: export PYTHONPATH = $(CURDIR)/tests/bus/without_fast

.PHONY: test-bus
test-bus: bootstrap host-root ## The real daemon on a private bus with real QEMUs, with each D-Bus library
	@$(foreach library,$(LIBRARIES),$(MAKE) --no-print-directory $(library) &&) true

.PHONY: dbus_fast dbus_next
dbus_fast dbus_next:
	CPR_TEST_REQUIRE_QEMUS=1 CPR_TEST_LIBRARY=$@ $(PYTHON) -m pytest --numprocesses=auto --dist=worksteal $(BUS_TESTS)

.PHONY: test-host
test-host: bootstrap host-root $(DEB) ## One real kexec in the host VM, with the built package
	$(PYTHON) -m pytest -s tests/host

.PHONY: test
test: check ## Everything: lint, unit, bus, one real kexec
	$(MAKE) host-root $(DEB) $(RPM)
	$(PYTHON) -m pytest tests/packages/test_packages.py
	$(MAKE) test-bus
	$(PYTHON) -m pytest -s tests/host

.PHONY: test-faults
test-faults: bootstrap host-root $(DEB) ## Forty minutes: kills, power cuts and refused kexecs, and what guests made of them
	rm -f build/faults
	CPR_TEST_EXAMPLES=2000 CPR_TEST_REQUIRE_QEMUS=1 $(PYTHON) -m pytest --numprocesses=2 --dist=worksteal \
	    tests/faults tests/unit/test_core_stateful.py
	@$(PYTHON) -m tests.faults.tally

.PHONY: test-corruption
test-corruption: bootstrap host-root $(DEB) ## Everything that can happen to a saved guest's memory, state, disks, machine
	rm -f build/corruptions
	CPR_TEST_REQUIRE_QEMUS=1 $(PYTHON) -m pytest -s tests/corruption
	@$(PYTHON) -m tests.corruption.tally

.PHONY: test-packages
test-packages: bootstrap host-root $(DEB) $(RPM) page ## Packages: lint, files, same bytes twice; upgrade and removal under guests
	$(PYTHON) -m pytest -s tests/packages
	$(MAKE) --no-print-directory reproducible

.PHONY: test-guests
test-guests: bootstrap host-root $(DEB) ## Other guests, other memory, other QEMUs, each through what it has to survive
	rm -f build/guests
	CPR_TEST_REQUIRE_QEMUS=1 $(PYTHON) -m pytest -s tests/guests
	@$(PYTHON) -m tests.guests.tally

.PHONY: qemu-cpr
qemu-cpr: bootstrap ## Build (once) QEMUs that have cpr-save and cpr-load, from Debian's sources
	@scripts/qemu-cpr build 13
	@scripts/qemu-cpr build 12

.PHONY: test-original
test-original: bootstrap host-root qemu-cpr $(DEB) ## A QEMU with cpr-save and cpr-load, alone and under the agent
	rm -f build/original
	CPR_TEST_REQUIRE_QEMUS=1 $(PYTHON) -m pytest -s tests/original
	@$(PYTHON) -m tests.original.tally

.PHONY: test-pause
test-pause: bootstrap host-root $(DEB) ## Who costs the pause of a real host, and units that stop before its guests
	$(PYTHON) -m pytest -s tests/pause

.PHONY: test-machines
test-machines: bootstrap host-root $(DEB) ## VMs in the list of systemd-machined, through a save, a refresh and a kexec
	$(PYTHON) -m pytest -s tests/machines

.PHONY: test-cockpit
test-cockpit: bootstrap host-root $(DEB) $(PAGE_DEB) ## The Cockpit page in a real browser, with two real Cockpits, and over a kexec
	@scripts/bootstrap --cockpit
	@for release in 12 13 host; do scripts/cockpit build $$release >/dev/null; done
	rm -rf build/pages
	CPR_TEST_REQUIRE_QEMUS=1 $(PYTHON) -m pytest --numprocesses=2 --dist=loadfile tests/cockpit || true
	@$(PYTHON) -m tests.cockpit.tally

.PHONY: test-fleet
test-fleet: bootstrap host-root $(DEB) ## Two host VMs upgraded by the Ansible role, three kexecs in all
	rm -f build/fleet/summary
	$(PYTHON) -m pytest -s tests/fleet
	@cat build/fleet/summary

.PHONY: test-access
test-access: bootstrap host-root $(DEB) ## Who may what, by a real polkit, and what confines agent and QEMU, in the host VM
	rm -f build/access build/isolation
	$(PYTHON) -m pytest -s tests/access
	@$(PYTHON) -m tests.access.tally

.PHONY: test-hostile
test-hostile: bootstrap host-root ## Hostile QEMUs, users and input; CPR_TEST_FUZZ_S=600 and CPR_TEST_CASE_S=60 for long runs
	rm -f build/hostile
	CPR_TEST_REQUIRE_QEMUS=1 $(PYTHON) -m pytest -s tests/hostile
	@$(PYTHON) -m tests.hostile.tally

.PHONY: test-reports
test-reports: bootstrap host-root $(DEB) ## What people met with live QEMUs, kernels and imports; 500 random sequences
	rm -f build/reports
	CPR_TEST_REQUIRE_QEMUS=1 $(PYTHON) -m pytest -s -p tests.reports.tally tests/reports || true
	@$(PYTHON) -m tests.reports.tally

HOURS := 1
.PHONY: soak
soak: bootstrap host-root ## HOURS=1 of those sequences over eight guests, with 1,000 faults an hour
	@$(PYTHON) -m tests.reports.soak --hours $(HOURS)

.PHONY: bench
bench: ## What the agent costs, against a bare script, libvirt, and this machine (docs/bench.md)
	@scripts/bootstrap --bench
	env -u PYTHONDONTWRITEBYTECODE $(PYTHON) -m scripts.bench

.PHONY: bench-host
bench-host: bootstrap host-root $(DEB) ## From the start of userspace to the first guest's cont, against a bare unit, by real kexecs
	$(PYTHON) -m scripts.bench.host

.PHONY: libvirt-roots
libvirt-roots: bootstrap ## Build (once) three roots of Debian, each with a pair of libvirt and QEMU
	@for release in 12 13 backports; do scripts/libvirt-root build $$release; done

.PHONY: test-libvirt
test-libvirt: bootstrap host-root libvirt-roots $(DEB) ## Domains under real libvirtds, in other hands too, and through a real kexec
	rm -f build/libvirt
	CPR_TEST_REQUIRE_QEMUS=1 $(PYTHON) -m pytest -s tests/libvirt
	@$(PYTHON) -m tests.libvirt.tally

.PHONY: bench-domains
bench-domains: bootstrap ## Domains under the agent, against libvirt alone and a bare script
	@scripts/libvirt-root build 13
	env -u PYTHONDONTWRITEBYTECODE $(PYTHON) -m scripts.bench.domains

.PHONY: host-root
host-root: bootstrap ## Build (once) the Debian 13 root that the host VM boots
	@scripts/host-vm build

.PHONY: demo
demo: bootstrap ## Two guests and a libvirt domain live through a real kexec of a host VM
	@$(MAKE) --no-print-directory host-root $(DEB)
	@scripts/demo --deb $(DEB)

.PHONY: report-sample
report-sample: demo ## The same, and what `cprctl report` makes of it: build/report-sample.svg and .html
	@for form in svg html; do \
		cp build/demo/host/artefacts/report.$$form build/report-sample.$$form && echo build/report-sample.$$form; \
	done

.PHONY: demo-quick
demo-quick: bootstrap ## Save, a new QEMU, load: on this machine, in under a minute
	@$(PYTHON) scripts/demo-quick

.PHONY: deb
deb: $(DEB) ## Build the Debian package

.PHONY: rpm
rpm: $(RPM) ## Build the RPM package

.PHONY: page
page: build/cockpit/index.html ## Bundle the Cockpit page and build its packages, .deb and .rpm
	@$(MAKE) --no-print-directory $(PAGE_DEB) $(PAGE_RPM)

build/cockpit/index.html: $(PAGE_SOURCES) scripts/build-page
	@scripts/bootstrap --page
	scripts/build-page build/cockpit

$(PAGE_DEB) $(PAGE_RPM): build/cockpit/index.html

$(DEB) $(RPM) $(PAGE_DEB) $(PAGE_RPM): $(SOURCES) scripts/build-package
	@scripts/bootstrap
	scripts/build-package $(VENV) $@

.PHONY: lint-deb
lint-deb: $(DEB) ## Build the Debian package; any error or warning of lintian fails
	lintian --allow-root --pedantic --fail-on error,warning $(DEB)

.PHONY: reproducible
reproducible: bootstrap page ## Build all packages twice, under other circumstances; the same bytes
	scripts/reproducible $(VENV) $(DEB) $(RPM) $(PAGE_DEB) $(PAGE_RPM)

.PHONY: man
man: $(MAN_PAGES) ## Make the man pages, in build/man (try: man -l build/man/cprctl.1)

build/man/%: packaging/man/%.scd
	@mkdir -p build/man
	scdoc <$< >$@

build/man/org.cpragent1.5: packaging/man/interface agent/cpr_agent/bus/org.cpragent1.xml docs/operations.md
	@mkdir -p build/man
	python3 $^ | scdoc >$@

.PHONY: docs
docs: ## Make a site of documents and man pages, in build/site; a link that leads nowhere fails
	@scripts/bootstrap --docs
	$(PYTHON) -m mkdocs build --strict --config-file packaging/site/mkdocs.yml

.PHONY: install
install: man ## Install into DESTDIR (for packages; needs build/vendor)
	install -d $(DESTDIR)/usr/lib/cpr-agent $(DESTDIR)/usr/libexec/cpr-agent $(DESTDIR)/etc/cpr-agent/vms
	cp -r agent/cpr_agent build/vendor/qemu $(DESTDIR)/usr/lib/cpr-agent/
	find $(DESTDIR)/usr/lib/cpr-agent -name __pycache__ -prune -exec rm -r {} +
	install -D packaging/bin/cprctl $(DESTDIR)/usr/bin/cprctl
	install -D packaging/bin/cpr-agentd $(DESTDIR)/usr/sbin/cpr-agentd
	install units/save-before-kexec units/gate units/before-removal units/set-up-vm units/start-early units/renew-early units/keep-users $(DESTDIR)/usr/libexec/cpr-agent/
	install -D -m 644 packaging/completions/cprctl.bash $(DESTDIR)/usr/share/bash-completion/completions/cprctl
	install -D -m 644 packaging/completions/_cprctl -t $(DESTDIR)/usr/share/zsh/vendor-completions
	install -D -m 644 packaging/completions/cprctl.fish -t $(DESTDIR)/usr/share/fish/vendor_completions.d
	install -D -m 644 -t $(DESTDIR)/usr/lib/systemd/system units/cpr-*.service
	install -D -m 644 units/80-cpr-agent.preset -t $(DESTDIR)/usr/lib/systemd/system-preset
	install -D -m 644 units/org.cpragent1.service -t $(DESTDIR)/usr/share/dbus-1/system-services
	install -D -m 644 units/cpr-agent.catalog -t $(DESTDIR)/usr/lib/systemd/catalog
	install -D -m 644 units/cpr-agent.sysusers $(DESTDIR)/usr/lib/sysusers.d/cpr-agent.conf
	install -D -m 644 units/cpr-agent.tmpfiles $(DESTDIR)/usr/lib/tmpfiles.d/cpr-agent.conf
	install -D -m 644 policies/org.cpragent1.conf -t $(DESTDIR)/usr/share/dbus-1/system.d
	install -D -m 644 policies/org.cpragent1.policy -t $(DESTDIR)/usr/share/polkit-1/actions
	install -D -m 644 policies/50-cpr-operators.rules -t $(DESTDIR)/usr/share/doc/cpr-agent/examples
	install -D -m 644 policies/apparmor/cpr-* -t $(DESTDIR)/etc/apparmor.d
	install -D -m 644 policies/apparmor/abstractions/cpr-vm -t $(DESTDIR)/etc/apparmor.d/abstractions
	install -D -m 644 policies/apparmor/abstractions/libvirt-qemu.d/cpr-agent -t $(DESTDIR)/etc/apparmor.d/abstractions/libvirt-qemu.d
	install -D -m 755 units/libvirt-hook $(DESTDIR)/etc/libvirt/hooks/qemu.d/cpr-agent
	install -D -m 644 agent/cpr_agent/bus/org.cpragent1.xml -t $(DESTDIR)/usr/share/dbus-1/interfaces
	install -d $(DESTDIR)/usr/share/cpr-agent/ansible
	cp -r $(addprefix packaging/ansible/,inventory.example roles upgrade-hosts.yml) $(DESTDIR)/usr/share/cpr-agent/ansible/
	install -D -m 644 packaging/ansible/README.md $(DESTDIR)/usr/share/doc/cpr-agent/README.ansible.md
	install -D -m 644 packaging/agent.toml $(DESTDIR)/etc/cpr-agent/agent.toml
	install -D -m 644 agent/cpr_agent/cli/example-vm.toml $(DESTDIR)/usr/share/doc/cpr-agent/examples/web1.toml
	install -D -m 755 packaging/example-check-hook $(DESTDIR)/usr/share/doc/cpr-agent/examples/check-hook
	install -D -m 644 docs/*.md docs/*.svg -t $(DESTDIR)/usr/share/doc/cpr-agent
	install -D -m 644 docs/adr/*.md -t $(DESTDIR)/usr/share/doc/cpr-agent/adr
	install -D -m 644 docs/schema/*.json -t $(DESTDIR)/usr/share/doc/cpr-agent/schema
	for page in $(MAN_PAGES); do \
	    install -D -m 644 $$page -t $(DESTDIR)/usr/share/man/man$${page##*.}; \
	done

.PHONY: install-page
install-page: ## Install the Cockpit page into DESTDIR (for packages; needs build/cockpit)
	install -D -m 644 -t $(DESTDIR)/usr/share/cockpit/cpr-agent build/cockpit/*
	install -D -m 644 -t $(DESTDIR)/usr/share/metainfo cockpit/org.cpragent1.cockpit.metainfo.xml

.PHONY: clean
clean: ## Remove build/
	rm -rf build

# make demo    the main job on real ESP, in a lab of network namespaces
# make test    lint and all tests
# make test-vm on Debian's own kernel, systemd and strongSwan, in a virtual machine
# make torture faults, floods, hostile packets, in full (half an hour)
# make bench   what it costs, beside plain forwarding, C and Suricata (some minutes)
# make install the daemon, the client, the unit, under /usr/local
# make deb     the same as a Debian package, in build/; `make deb-test` installs, upgrades and purges it
#
# What is missing on this machine (Debian packages, a virtual environment) is installed first.

SHELL := /bin/bash
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
INSTALLED := /usr/local/lib/fwd

# Shell, and where it looks for the completion of others' commands below share/; fwctl itself prints what goes there.
COMPLETIONS := bash:bash-completion/completions/fwctl zsh:zsh/site-functions/_fwctl \
  fish:fish/vendor_completions.d/fwctl.fish

# To build netfilterqueue; to install rules and to reload; for the package; for the lab and its tests.
BUILD_PACKAGES := python3-venv python3-dev gcc libc6-dev libnetfilter-queue-dev
RUN_PACKAGES := nftables iptables procps
DEB_PACKAGES := debhelper build-essential
LAB_PACKAGES := e2fsprogs iproute2 iputils-ping fping tcpdump mmdebstrap systemd ethtool nfdump
VM_PACKAGES := qemu-system-x86 qemu-utils mmdebstrap e2fsprogs git

define need
	@missing=$$(for p in $(1); do dpkg-query -W -f='$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
	if [ -n "$$missing" ]; then \
	  echo "installing" $$missing; \
	  $(SUDO) apt-get update -q && \
	  $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $$missing; \
	fi
endef

.PHONY: help setup demo lint test test-vm torture unit bench install uninstall deb deb-test clean

help:
	@sed -n 's/^# //p' Makefile | head -7

setup: $(READY)

$(READY): pyproject.toml
	$(call need,$(BUILD_PACKAGES) $(RUN_PACKAGES) $(LAB_PACKAGES))
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q --disable-pip-version-check -e '.[test]'
	@touch $@

demo: $(READY)
	$(SUDO) $(VENV)/bin/python -m lab demo

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# Two at a time, but for those that hold how long something takes against a limit.
test: lint
	$(SUDO) $(VENV)/bin/python -m pytest -n 2 --dist worksteal -m 'not alone'
	$(SUDO) $(VENV)/bin/python -m pytest -m alone

# The first time it makes the machine's disk. RELEASE=trixie: Debian 13.
RELEASE ?= bookworm
test-vm: $(READY)
	$(call need,$(VM_PACKAGES))
	$(SUDO) $(VENV)/bin/python -m lab vm run --release $(RELEASE)

# What `make test` runs small, at full length.
torture: $(READY)
	$(VENV)/bin/pip install -q --disable-pip-version-check -e '.[torture]'
	$(SUDO) env FWD_TORTURE=full $(VENV)/bin/python -m pytest -v tests/torture

bench: $(READY)
	$(VENV)/bin/pip install -q --disable-pip-version-check -e '.[bench]'
	$(SUDO) $(VENV)/bin/python -m bench

# Only what needs neither root nor a lab.
unit: $(READY)
	$(VENV)/bin/python -m pytest tests/core tests/cli tests/doctor tests/test_api.py tests/test_config.py tests/test_daemon.py

install:
	$(call need,$(BUILD_PACKAGES) $(RUN_PACKAGES))
	$(SUDO) $(PYTHON) -m venv --clear $(INSTALLED)
	$(SUDO) $(INSTALLED)/bin/pip install -q --disable-pip-version-check .
	$(SUDO) install -d /usr/local/sbin /usr/local/bin /usr/local/share/doc/fwd /etc/fwd
	$(SUDO) ln -sf $(INSTALLED)/bin/fwd /usr/local/sbin/fwd
	$(SUDO) ln -sf $(INSTALLED)/bin/fwctl /usr/local/bin/fwctl
	$(SUDO) install -m 644 README.md ARCHITECTURE.md CHANGELOG.md systemd/fwd.toml /usr/local/share/doc/fwd/
	$(SUDO) cp -R docs /usr/local/share/doc/fwd/
	@test -e /etc/fwd/fwd.toml || $(SUDO) install -m 644 systemd/fwd.toml /etc/fwd/fwd.toml
	$(SUDO) $(INSTALLED)/bin/python -m fwd.man /usr/local/share/man
	@for to in $(COMPLETIONS); do \
	  _FWCTL_COMPLETE=$${to%%:*}_source $(INSTALLED)/bin/fwctl | $(SUDO) install -D -m 644 /dev/stdin /usr/local/share/$${to#*:}; \
	done
	$(SUDO) install -D -m 644 systemd/fwd.sysusers /usr/local/lib/sysusers.d/fwd.conf
	$(SUDO) install -D -m 644 systemd/fwd.service /etc/systemd/system/fwd.service
	$(SUDO) install -D -m 644 systemd/strongswan.conf /etc/systemd/system/strongswan.service.d/fwd.conf
	$(SUDO) systemd-sysusers /usr/local/lib/sysusers.d/fwd.conf
	@if [ -d /run/systemd/system ]; then $(SUDO) systemctl daemon-reload; fi
	@echo "Installed. Look at /etc/fwd/fwd.toml, then: systemctl enable --now fwd"

uninstall:
	@if [ -d /run/systemd/system -a -e /etc/systemd/system/fwd.service ]; then $(SUDO) systemctl disable --now fwd; fi
	$(SUDO) rm -rf $(INSTALLED) /usr/local/share/doc/fwd /run/fwd
	$(SUDO) rm -f $(foreach to,$(COMPLETIONS),/usr/local/share/$(lastword $(subst :, ,$(to)))) \
	  $(addprefix /usr/local/share/man/,man1/fwctl.1 man8/fwd.8 man5/fwd.toml.5)
	$(SUDO) rm -f /usr/local/sbin/fwd /usr/local/bin/fwctl /usr/local/lib/sysusers.d/fwd.conf \
	  /etc/systemd/system/fwd.service /etc/systemd/system/strongswan.service.d/fwd.conf
	@if [ -d /run/systemd/system ]; then $(SUDO) systemctl daemon-reload; fi
	@echo "Removed. /etc/fwd and /var/log/fwd are left: they are yours."

# systemd/debian/ says what is in it. It is for the Debian and the Python that build it.
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' fwd/__init__.py)
DEB_TREE := build/deb/fwd

deb:
	$(call need,$(BUILD_PACKAGES) $(DEB_PACKAGES))
	rm -rf build/deb build/fwd_*.deb
	mkdir -p $(DEB_TREE)
	cp -R pyproject.toml README.md ARCHITECTURE.md CHANGELOG.md fwd systemd docs $(DEB_TREE)
	mv $(DEB_TREE)/systemd/debian $(DEB_TREE)/debian
	printf 'fwd (%s) unstable; urgency=medium\n\n  * See CHANGELOG.md.\n\n -- %s  %s\n' '$(VERSION)' \
	  "$$(sed -n 's/^Maintainer: //p' systemd/debian/control)" "$$(date -R)" > $(DEB_TREE)/debian/changelog
	cd $(DEB_TREE) && dpkg-buildpackage --build=binary --unsigned-changes
	mv build/deb/fwd_*.deb build/

# On a system of its own, in namespaces, whose first process is systemd.
deb-test: deb $(READY)
	$(SUDO) env FWD_DEB="$$(echo build/fwd_*.deb)" $(VENV)/bin/python -m pytest -v tests/systemd/test_package.py

clean:
	rm -rf $(VENV) build *.egg-info

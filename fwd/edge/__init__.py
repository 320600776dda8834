"""The edges: NFQUEUE, VICI, netfilter rules, interfaces, the control socket, systemd. No decisions here."""

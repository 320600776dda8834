"""fwctl, the command line: it talks to the control socket and prints."""

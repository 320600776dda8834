"""The least that a program on the netfilterqueue package can do: accept every packet. `empty_callback.py NUMBER`."""

import sys

from netfilterqueue import NetfilterQueue

queue = NetfilterQueue()
queue.bind(int(sys.argv[1]), lambda packet: packet.accept(), max_len=4096, sock_len=8 << 20)
print("ready", flush=True)
queue.run()

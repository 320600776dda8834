"""The client's end of the control socket, without a socket."""

from fwd.cli.client import Client


def test_pages_of_tunnels_are_put_together(monkeypatch):
    asked = []

    def call(self, method, **params):
        asked.append((method, params))
        after = params.get("after", 0)
        following = after + 2 if after < 4 else None
        return {"source": after, "tunnels": [after + 1, after + 2], "strangers": [after], "next": following}

    monkeypatch.setattr(Client, "call", call)
    assert Client("/nowhere").tunnels("gw") == {
        "source": 0,
        "tunnels": [1, 2, 3, 4, 5, 6],
        "strangers": [0, 2, 4],
    }
    assert asked[-1] == ("tunnel.detail", {"name": "gw", "after": 4}) and len(asked) == 3

"""The client's end of the control socket, without a socket."""

from fwd.cli.client import Client


def test_pages_of_tunnels_are_put_together(monkeypatch):
    asked = []

    def call(self, method, **params):
        asked.append((method, params))
        after = params.get("after", 0)
        following = after + 2 if after < 4 else None
        return {
            "source": {"connected": True},
            "tunnels": [after + 1, after + 2],
            "strangers": [after],
            "next": following,
        }

    monkeypatch.setattr(Client, "call", call)
    assert Client("/nowhere").tunnels("gw") == {
        "source": {"connected": True},
        "tunnels": [1, 2, 3, 4, 5, 6],
        "strangers": [0, 2, 4],
    }
    assert asked[-1] == ("tunnel.detail", {"name": "gw", "after": 4}) and len(asked) == 3


def test_a_count_is_the_sum_of_its_pages(monkeypatch):
    pages = {0: {"count": 3, "next": 7}, 7: {"count": 0, "next": 9}, 9: {"count": 2, "next": None}}
    monkeypatch.setattr(Client, "call", lambda self, method, filter, after=0: dict(pages[after]))
    assert Client("/nowhere").session_count({"state": "active"}) == {"count": 5}


def test_what_is_cleared_was_there_when_it_began(monkeypatch):
    pages = {
        (0, None): {"cleared": 3, "next": 7, "until": 9},
        (7, 9): {"cleared": 0, "next": 8, "until": 9},
        (8, 9): {"cleared": 2, "next": None, "until": 9},
    }
    monkeypatch.setattr(Client, "call", lambda self, method, filter, after=0, until=None: dict(pages[after, until]))
    assert Client("/nowhere").clear({"state": "active"}) == 5

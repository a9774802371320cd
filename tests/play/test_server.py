import contextlib
import io
import json
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest

from fxq.cli.play import EXAMPLE
from fxq.comparison.bundles.contestant import FULL_PRECISION
from fxq.play.show import Show

uvicorn = pytest.importorskip("uvicorn")
client = pytest.importorskip("websockets.sync.client")


class Served:
    """The page on a free port of this machine."""

    def __init__(self, stage):
        from fxq.play.server import Player

        self.player = Player(stage)
        config = uvicorn.Config(self.player.app(["127.0.0.1", "localhost"]), port=0, log_level="warning")
        self.socket = config.bind_socket()
        self.port = self.socket.getsockname()[1]
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            self.thread.join(0.02)

    def get(self, path, **headers):
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers=headers)
        return urllib.request.urlopen(request, timeout=60)

    @contextlib.contextmanager
    def page(self, **options):
        with client.connect(f"ws://127.0.0.1:{self.port}/stream", **options) as socket:
            yield socket, json.loads(socket.recv(timeout=60))

    def close(self):
        self.server.should_exit = True
        self.thread.join(30)
        self.socket.close()


@pytest.fixture
def served(stage):
    found = Served(stage)
    yield found
    found.close()


def tell(socket, **message):
    socket.send(json.dumps(message))
    return json.loads(socket.recv(timeout=120))


def start(socket, models, chunks=2, prompt=EXAMPLE):
    return tell(socket, do="start", models=models, prompt=prompt, seed=3, chunks=chunks)


def chunk(socket):
    head = tell(socket, do="next")
    content, parts, offset = socket.recv(timeout=120), [], 0
    for panel in head["panels"]:
        shape = (*panel["size"], 3)
        parts.append(np.frombuffer(content, np.uint8, int(np.prod(shape)), offset).reshape(shape))
        offset += parts[-1].size
    assert offset == len(content)
    return head, parts


def test_the_page_and_its_files_come_from_here_only(served):
    with served.get("/") as answer:
        page = answer.read().decode()
        assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
    assert "http://" not in page and "https://" not in page
    for name in ("play.js", "play.css"):
        with served.get(f"/{name}") as answer:
            assert answer.status == 200 and name in page
    for path in ("/play.html/../server.py", "/../server.py", "/page", "/film/x.mp4"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            served.get(path)
        assert caught.value.code == 404


def test_other_hosts_and_other_pages_are_refused(served):
    with pytest.raises(urllib.error.HTTPError) as caught:
        served.get("/", Host="evil.example")
    assert caught.value.code == 400
    with pytest.raises(Exception, match="403"), served.page(origin="http://evil.example"):
        pass


def test_a_page_gets_the_chunks_it_asks_for(served, stage, bundle):
    with served.page() as (socket, welcome):
        assert welcome["models"] == [FULL_PRECISION, bundle.name] and welcome["chunks"] == stage.chunks
        assert str(bundle.parent) not in json.dumps(welcome)
        started = start(socket, welcome["models"])
        assert [panel["name"] for panel in started["panels"]] == welcome["models"]
        expected = Show(stage, welcome["models"], EXAMPLE, 3, 2)
        for number in (1, 2):
            head, parts = chunk(socket)
            assert (head["number"], head["ended"]) == (number, number == 2)
            for got, want in zip(parts, expected.next_chunk(), strict=True):
                assert np.array_equal(got, want.frames)
        assert "at its end" in tell(socket, do="next")["why"]


def test_nothing_is_made_that_nobody_asked_for(served):
    with served.page() as (socket, welcome):
        start(socket, [FULL_PRECISION], 0)
        chunk(socket)
        show = served.player.shows[welcome["token"]]
        with pytest.raises(TimeoutError):
            socket.recv(timeout=1)
        assert show.done == 1


def test_a_closed_page_ends_its_video(served):
    with served.page() as (socket, welcome):
        start(socket, [FULL_PRECISION])
        chunk(socket)
        assert welcome["token"] in served.player.shows
    for _ in range(100):
        if not served.player.shows:
            break
        threading.Event().wait(0.05)
    assert not served.player.shows


def test_two_pages_do_not_disturb_each_other(served, bundle):
    with served.page() as (one, _), served.page() as (two, _):
        start(one, [FULL_PRECISION])
        start(two, [bundle.name], prompt="cross blue left fast black row1 column2")
        first, second = chunk(one)[1][0], chunk(two)[1][0]
        assert not np.array_equal(first, second)
        assert chunk(one)[0]["number"] == chunk(two)[0]["number"] == 2
        start(two, [FULL_PRECISION])
        assert np.array_equal(chunk(two)[1][0], first)


def test_a_prompt_is_changed_in_the_middle(served):
    with served.page() as (socket, _):
        start(socket, [FULL_PRECISION], 3)
        chunk(socket)
        assert "needs exactly one" in tell(socket, do="prompt", prompt="ring")["why"]
        assert tell(socket, do="prompt", prompt="cross blue left fast black row1 column2") == {
            "kind": "asked",
            "chunk": 1,
        }
        chunk(socket)


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ("{", "expected a JSON object"),
        ("[" * 10_000, "expected a JSON object"),
        ('{"do": "stop"}', "start, next or prompt"),
        ('{"do": "next"}', "nothing is running"),
        ('{"do": "start", "models": "x"}', "expected a list of names"),
        ('{"do": "start", "models": ["x"], "seed": 1.5}', "expected whole numbers"),
        ('{"do": "start", "models": ["x"], "seed": true}', "expected whole numbers"),
        ("x" * 20_000, "expected a JSON object"),
    ],
)
def test_a_wrong_message_is_refused_and_the_page_goes_on(served, message, why):
    with served.page() as (socket, _):
        socket.send(message)
        assert why in json.loads(socket.recv(timeout=60))["why"]
        assert start(socket, [FULL_PRECISION])["kind"] == "started"


def test_the_video_comes_as_a_file(served):
    av = pytest.importorskip("av")
    with served.page() as (socket, welcome):
        start(socket, [FULL_PRECISION], 2)
        path = f"/film/{welcome['token']}.mp4"
        with pytest.raises(urllib.error.HTTPError) as caught:
            served.get(path)
        assert caught.value.code == 409
        frames = sum(len(chunk(socket)[1][0]) for _ in range(2))
        with served.get(path) as answer, av.open(io.BytesIO(answer.read())) as video:
            assert len(list(video.decode(video=0))) == frames

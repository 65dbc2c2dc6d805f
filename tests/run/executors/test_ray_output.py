from __future__ import annotations

import sys
import threading

import pytest

from noisescale.run.executors.ray_output import rays_messages_to_stderr


def test_only_rays_threads_are_sent_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout
    with rays_messages_to_stderr():
        for name in ("ray_listen_error_messages", "mine"):
            thread = threading.Thread(target=print, args=(name,), name=name)
            thread.start()
            thread.join()
        print("result")
    assert sys.stdout is before
    captured = capsys.readouterr()
    assert captured.out == "mine\nresult\n"
    assert captured.err == "ray_listen_error_messages\n"

import logging
import sys
import threading
import warnings

import pytest

from fxq.runtime.exclusive import exclusive, one_at_a_time, quiet


def in_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    return thread


def test_a_second_thread_waits_until_the_first_is_out():
    entered, order = threading.Event(), []

    @exclusive
    def second():
        order.append("second")

    def waiting():
        entered.set()
        second()

    with one_at_a_time():
        thread = in_thread(waiting)
        entered.wait(30)
        thread.join(0.05)
        order.append("first")
    thread.join(30)
    assert order == ["first", "second"]


def test_blocks_nest_and_give_back_what_an_error_left():
    with pytest.raises(KeyError), one_at_a_time(), one_at_a_time():
        raise KeyError("inside")
    done = threading.Event()
    thread = in_thread(lambda: exclusive(done.set)())
    thread.join(30)
    assert done.is_set()


def test_an_exclusive_function_keeps_its_name_and_result():
    @exclusive
    def double(x):
        """Twice."""
        return 2 * x

    assert (double.__name__, double.__doc__, double(4)) == ("double", "Twice.", 8)


def test_in_a_quiet_block_this_thread_is_not_heard_and_others_are(capsys):
    logger = logging.getLogger("tests.quiet")
    logger.setLevel(logging.INFO)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with quiet("tests.quiet"):
            warnings.warn("ignored", stacklevel=1)
            print("mine", file=sys.stderr)
            assert logger.level == logging.ERROR
            in_thread(lambda: print("theirs", file=sys.stderr)).join()
        warnings.warn("heard", stacklevel=1)
    assert [str(w.message) for w in caught] == ["heard"] and logger.level == logging.INFO
    assert capsys.readouterr().err == "theirs\n"


def test_whoever_keeps_the_muted_stream_is_heard_later(capsys):
    before = sys.stderr
    with quiet():
        kept = sys.stderr
    assert sys.stderr is before
    kept.write("later")
    assert capsys.readouterr().err == "later"


def test_a_missing_stream_is_put_back_missing(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with quiet():
        print("nobody", file=sys.stderr)
        sys.stderr.flush()
    assert sys.stderr is None

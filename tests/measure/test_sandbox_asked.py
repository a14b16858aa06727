"""A test asks a program from a process of its own: what it is given, what crosses, what comes back."""

import textwrap

import pytest

from layerskip.measure.tasks.sandbox import Limits, run

QUICK = Limits(seconds=0.5, memory_bytes=192 << 20)
PATIENT = Limits(seconds=10, memory_bytes=192 << 20)


def asked(program, test, limits=PATIENT, **more):
    return run(textwrap.dedent(program), textwrap.dedent(test), limits, function="f", **more)


def test_a_test_has_what_it_is_given_and_not_what_the_program_defines():
    """HumanEval's tests of decode_shift and two others call a helper of the prompt."""
    given = "def helper(n):\n    return n + 1\n\n\ndef f(n):\n    pass\n"
    test = "assert f(helper(1)) == 20"
    right = "def f(n): return 10 * n"
    assert asked(right, test, given=given).passed
    assert not asked(
        "def helper(n): return 2\ndef f(n): return 10 * n", "assert helper(5) == 2", given=given
    ).passed
    assert asked(right, test).detail == "NameError: name 'helper' is not defined"
    assert asked("def helper(n): return 99\n" + right, test, given=given).passed


def test_values_cross_with_their_types_and_arguments_by_name():
    program = "def f(*args, **names): return [args, names]"
    values = (
        "None, True, 1, 2.5, float('inf'), -3j, 'x', b'y', [1, [2]], (), {1}, frozenset(), {'a': (1,), 2: {}}"
    )
    test = f"""
        values = ({values})
        got = f(*values, key=[0])
        assert repr(got) == repr([values, {{'key': [0]}}])
        assert f(1)[0] == (1.0,)
    """
    assert (outcome := asked(program, test)).passed, outcome


HONEST = {  # what is no plain data itself and counts as what it is based on
    "a counter": ("from collections import Counter\ndef f(): return Counter('aab')", "{'a': 2, 'b': 1}"),
    "a default dictionary": (
        "from collections import defaultdict as d\ndef f(): return d(int, a=1)",
        "{'a': 1}",
    ),
    "a named tuple": (
        "from collections import namedtuple as n\ndef f(): return n('P', 'x y')(1, 2)",
        "(1, 2)",
    ),
    "a number with a name": ("from enum import IntEnum\ndef f(): return IntEnum('E', 'a').a", "1"),
    "numbers of numpy": (
        "import numpy\ndef f(): return [*numpy.arange(3), numpy.mean([1, 2])]",
        "[0, 1, 2, 1.5]",
    ),
    "a truth of numpy": ("import numpy\ndef f(): return numpy.all([1])", "True"),
}


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_answer_counts_as_plain_data(name):
    program, right = HONEST[name]
    assert (outcome := asked(program, f"assert f() == {right}")).passed, outcome


def test_exceptions_cross_with_their_kind_and_arguments():
    program = """
        class Own(KeyError): pass
        def f(n): raise [ValueError("bad", 3), Own("x"), OSError(2, "gone"), ZeroDivisionError()][n]
    """
    test = """
        for n, kind, args in [(0, ValueError, ("bad", 3)), (1, LookupError, ("x",)),
                              (2, FileNotFoundError, (2, "gone")), (3, ArithmeticError, ())]:
            try:
                f(n)
            except kind as error:
                assert error.args == args, error.args
            else:
                raise AssertionError(n)
    """
    assert (outcome := asked(program, test)).passed, outcome
    assert asked(program, "f(1)").detail == "Own: 'x'"


def test_the_arguments_of_the_test_stay_as_they_are():
    program = "def f(values):\n    values.append(3)\n    return values"
    assert asked(program, "given = [1]\nassert f(given) == [1, 3]\nassert given == [1]").passed


def test_a_test_that_catches_everything_does_not_catch_what_is_no_answer():
    test = "try: f()\nexcept BaseException: pass"
    assert asked("def f(): raise ValueError", test).passed
    assert asked("def f(): return f", test).status == "failed"


def test_the_test_has_limits_too():
    right = "def f(): return 1"
    assert asked(right, "f()\nwhile True: pass", QUICK).status == "timed_out"
    assert asked(right, "f()\nx = bytearray(1 << 40)", QUICK).status == "out_of_memory"
    assert asked(right, "f()\nopen('/etc/passwd', 'w')", QUICK).status == "refused"

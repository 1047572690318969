"""checks.py: what the Python tests count by, as test.h is for those in C."""
passed = failed = 0


def check(ok, what):
    global passed, failed
    if ok:
        passed += 1
    else:
        failed += 1
        print("FAILED:", what)


def end(name):
    """The last line of a test; whether one failed."""
    print("%s: %d passed, %d failed" % (name, passed, failed))
    return failed != 0

"""Where figures go: a file that is not there yet, opened before anything is measured."""
import argparse


def new_file(path):
    """The type of an argument -o: an older file might be somebody's, so none is replaced."""
    try:
        return open(path, "x")
    except OSError as e:
        raise argparse.ArgumentTypeError(f"{path}: {e.strerror}") from None

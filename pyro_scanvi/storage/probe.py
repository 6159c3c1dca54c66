"""Look at all of an HDF5 file in a process of its own, which a damaged one may end or never leave.

HDF5 follows what is written in a file. A flipped bit can make its C code run in a circle or read
where nothing is its own, and no ``except`` helps the process that it runs in. This one imports h5py
alone, and is executed as a script.
"""

import sys
from contextlib import suppress

import h5py

BEGUN, ENDED = "begun", "ended"


def look_at(name: str, item: h5py.Group | h5py.Dataset) -> None:
    """Read the attributes, the texts and where the parts of an array lie, but no numbers."""
    dict(item.attrs)
    if not isinstance(item, h5py.Dataset):
        return
    if item.dtype.kind == "O":
        item[()]
    elif item.chunks:
        item.id.chunk_iter(lambda chunk: None)


def main(path: str) -> None:
    """Print that it has begun and, if it comes to an end, that it has."""
    print(BEGUN, flush=True)
    # What Python can catch is left to the one who reads the file for good.
    with suppress(Exception), h5py.File(path) as file:
        look_at("/", file)
        file.visititems(look_at)
    print(ENDED)


if __name__ == "__main__":
    main(sys.argv[1])

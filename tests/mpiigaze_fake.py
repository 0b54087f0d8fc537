"A tiny MPIIGaze in the authors' layout, with random eyes, for tests that must not need the real one."

from pathlib import Path

import numpy as np
import scipy.io

PEOPLE, PER_SIDE = 15, 2
LISTS = 'Evaluation Subset/sample list for eye image'


def eyes(n, seed=0, **change):
    """One side of a day: image (n, 36, 60) uint8, gaze (n, 3) unit vectors, pose (n, 3); `change` replaces
    arrays."""
    g = np.random.default_rng(seed)
    gaze = g.normal(0, 0.2, (n, 3)) - [0, 0, 1]
    return (
        dict(
            image=g.integers(256, size=(n, 36, 60), dtype=np.uint8),
            gaze=gaze / np.linalg.norm(gaze, axis=1, keepdims=True),
            pose=g.normal(0, 0.2, (n, 3)),
        )
        | change
    )


def write_day(path, n, seed=0, left=None, right=None):
    "A day of n images, 0000.jpg onwards; `left` and `right` replace arrays. Returns its two sides."
    path.parent.mkdir(parents=True, exist_ok=True)
    data = dict(
        left=eyes(n, 2 * seed, **(left or {})), right=eyes(n, 2 * seed + 1, **(right or {}))
    )
    names = np.array([f'{i:04}.jpg' for i in range(n)], object)[:, None]
    scipy.io.savemat(path, dict(data=data, filenames=names))
    return data


def day(root, person, name):
    return Path(root) / f'Data/Normalized/p{person:02}/{name}.mat'


def listing(root, person):
    return Path(root) / LISTS / f'p{person:02}.txt'


def write_mpiigaze(root, people=PEOPLE):
    """Per person a day of three images and a day of one, and a list of PER_SIDE eyes per side. Returns
    {(person, day): sides}."""
    (Path(root) / LISTS).mkdir(parents=True)
    out = {}
    for k in range(people):
        for j, n in enumerate((3, 1), 1):
            out[k, f'day0{j}'] = write_day(day(root, k, f'day0{j}'), n, seed=10 * k + j)
        listing(root, k).write_text(
            'day01/0002.jpg left\nday02/0000.jpg right\nday01/0000.jpg right\nday02/0000.jpg left\n'
        )
    return out

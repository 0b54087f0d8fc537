"""Random crops of photographs: a folder of images without labels, for nbs/settings/unlabelled_crops.yaml."""

import argparse
from pathlib import Path

import torch
from torchvision.transforms import v2
from tqdm import tqdm

from xcl.image_files import list_images, open_image


def main(words: list = None) -> None:  # of the command line
    "Write `each` square crops of every photograph as PNG files, named by its number and theirs."
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('photographs', type=Path, help='folder, searched with its subfolders')
    p.add_argument('out', type=Path, help='folder of the crops; it must not exist')
    p.add_argument('--each', type=int, default=10, help='crops of a photograph')
    p.add_argument('--side', type=int, default=32, help='of a crop, pixels')
    p.add_argument('--seed', type=int, default=1)
    a = p.parse_args(words)
    files = list_images(a.photographs)
    a.out.mkdir(parents=True)
    torch.manual_seed(a.seed)
    crop = v2.RandomResizedCrop(a.side, scale=(0.1, 1), ratio=(1, 1))  # shares of the area
    for k in tqdm(range(len(files)), unit='photograph'):
        photograph, _ = open_image(files.path(k))
        for i in range(a.each):
            crop(photograph).save(a.out / f'{k:05}-{i:02}.png')


if __name__ == '__main__':
    main()
